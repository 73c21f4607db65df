"""What every subject here needs and none explains: formulas, meters, ranks, data, records, figures."""
