"""PipeDream: schedules simulated, models partitioned, pipelines run on real ranks."""
