"""Sends activations and gradients between the ranks of a pipeline so that no schedule can hang.

Who sends what to whom, and in which order, follows from the schedule, which every rank knows whole. A rank sends without waiting, and
posts its receives from another rank in the order in which that one sends: on gloo messages meet by tag, but NCCL, which knows no
tags, joins the n-th send to the n-th receive of a communicator. There is one communicator for each direction of each pair.
"""

from collections import defaultdict

import torch
import torch.distributed as dist

AHEAD = 2                       # receives posted beyond the one that is needed


def routes(schedule):
    """{(sender, receiver): [message in the order of sending]}; a message is ("F" or "B", part it comes from, micro-batch)."""
    last, owner, found = schedule.model_parts - 1, owners(schedule), defaultdict(list)
    for rank, ops in enumerate(schedule):
        for kind, k, chunk in ops:
            part = schedule.stage_of[rank][chunk]
            to = part + 1 if kind == "F" else part - 1
            if kind != "W" and 0 <= to <= last and owner[to, k] != rank:
                found[rank, owner[to, k]].append(("F" if kind == "F" else "B", part, k))
    return dict(found)


def owners(schedule):
    """{(part, micro-batch): rank that runs it}"""
    return {(schedule.stage_of[rank][op.chunk], op.micro_batch): rank
            for rank, ops in enumerate(schedule) for op in ops if op.kind == "F"}


def needs(schedule):
    """{(sender, receiver): [message in the order in which the receiver's operations need them]}"""
    last, owner, found = schedule.model_parts - 1, owners(schedule), defaultdict(list)
    for rank, ops in enumerate(schedule):
        for kind, k, chunk in ops:
            part = schedule.stage_of[rank][chunk]
            source = part - 1 if kind == "F" else part + 1
            if kind != "W" and 0 <= source <= last and owner[source, k] != rank:
                found[owner[source, k], rank].append(("F" if kind == "F" else "B", source, k))
    return dict(found)


def check_order(schedule, posts="sender"):
    """Raise ValueError where receives in an order would take the wrong message on a backend without tags, or wait for ever.

    posts: "sender": the order of this module; "need": each receive when an operation needs it, as simple pipelines do.
    """
    sent = routes(schedule)
    posted = {pair: list(messages) for pair, messages in (sent if posts == "sender" else needs(schedule)).items()}
    for (sender, receiver), messages in sent.items():
        for place, (out, into) in enumerate(zip(messages, posted.get((sender, receiver), []))):
            if out != into:
                raise ValueError(f"{schedule.name}: message {place} from rank {sender} to rank {receiver} is {_words(out)}, and the receive posted for "
                                 f"it expects {_words(into)}. Without tags (NCCL) rank {receiver} would take one for the other: post receives in "
                                 "the order of sending.")
        if sorted(messages) != sorted(posted.get((sender, receiver), [])):
            raise ValueError(f"{schedule.name}: rank {sender} and rank {receiver} do not agree on what is sent.")


def _words(message):
    kind, part, k = message
    return f"the {'output' if kind == 'F' else 'gradient'} of part {part} for micro-batch {k}"


class Messages:
    """The messages of one rank in one pass through a schedule. shape, dtype: of every activation and gradient, [B, T, D]."""

    def __init__(self, schedule, rank, shape, dtype, groups):
        self.rank, self.shape, self.dtype, self.groups = rank, shape, dtype, groups
        self.out = {message: (to, place) for (source, to), messages in routes(schedule).items() if source == rank.rank
                    for place, message in enumerate(messages)}
        self.into = {source: messages for (source, to), messages in routes(schedule).items() if to == rank.rank}
        self.place = {message: (source, place) for source, messages in self.into.items() for place, message in enumerate(messages)}
        self.posted, self.kept, self.sending = dict.fromkeys(self.into, 0), {}, []

    def send(self, message, tensor):
        """Begin to send; the tensor must not be changed. Handle and tensor are kept until the message has gone."""
        to, place = self.out[message]
        tensor = tensor.contiguous()
        self.sending = [(handle, kept) for handle, kept in self.sending if not handle.is_completed()]
        self.sending.append((dist.isend(tensor, to, group=self.groups[self.rank.rank, to], tag=place), tensor))

    def receive(self, message):
        """The tensor of a message, when it is here."""
        source, wanted = self.place[message]
        messages = self.into[source]
        while self.posted[source] < min(len(messages), wanted + 1 + AHEAD):
            place = self.posted[source]
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.rank.device)
            self.kept[messages[place]] = dist.irecv(buffer, source, group=self.groups[source, self.rank.rank], tag=place), buffer
            self.posted[source] += 1
        handle, buffer = self.kept.pop(message)
        handle.wait()
        return buffer

    def finish(self):
        """Wait until everything sent has gone."""
        for handle, _ in self.sending:
            handle.wait()
        self.sending = []


def communicators(schedule):
    """{(sender, receiver): process group}; every rank must call it, since all ranks make each group."""
    return {pair: dist.new_group(sorted(pair)) for pair in sorted(routes(schedule))}
