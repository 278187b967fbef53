"""What clinic and server say to each other, over Flower's messages."""

from fedpeft.protocol.carrier import carried, carry, raw
from fedpeft.protocol.job import PROTOCOL_VERSION, Job, RankTerms, SumTerms
from fedpeft.protocol.payload import ADAPTER, CONTENT_KEY, JOB, MAX_RANK, Payload, Value
from fedpeft.protocol.records import (
    EVALUATE,
    KINDS,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    VERDICT,
)
from fedpeft.protocol.sums import MESSAGE_TYPES

__all__ = [
    "ADAPTER",
    "CONTENT_KEY",
    "EVALUATE",
    "JOB",
    "KINDS",
    "MAX_RANK",
    "MESSAGE_TYPES",
    "NUM_EXAMPLES",
    "PROTOCOL_VERSION",
    "TRAIN",
    "TRAIN_NLL",
    "TRAIN_TOKENS",
    "VALID_NLL",
    "VALID_TOKENS",
    "VERDICT",
    "Job",
    "Payload",
    "RankTerms",
    "SumTerms",
    "Value",
    "carried",
    "carry",
    "raw",
]
