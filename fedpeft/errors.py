"""Every error that fedpeft raises on purpose, with its exit code and its reason.

    FedpeftError                    1   internal-error
    ├── ConfigError                 3   bad-config
    ├── DataError                   4   bad-data
    ├── ModelError                  5   bad-model
    │   ├── FingerprintMismatch     5   other-base-model
    │   ├── NotConvertible          5   not-convertible
    │   └── ExportDiffers           5   export-differs
    ├── AdapterError                6   bad-adapter
    │   ├── SchemaMismatch          6   wrong-adapter-schema
    │   └── AdapterNotHeld          6   adapter-not-held
    ├── TrainingError               7   training-failed
    │   ├── NotFinite               7   not-finite
    │   └── AdapterUnchanged        7   adapter-unchanged
    ├── FederationError             8   federation-failed
    ├── ConnectionFailed            9   connection-failed
    │   ├── PortInUse               9   port-in-use
    │   ├── CertificateRefused      9   wrong-certificate
    │   └── ClockSkew               9   clock-skew
    ├── EnrolmentError             10   not-enrolled
    ├── StorageError               11   storage-failed
    ├── PolicyRefused              12   refused-by-clinic
    │   ├── SecAggRequired         12   secagg-required
    │   ├── BudgetSpent            12   budget
    │   ├── UnitNotAllowed         12   unit-not-allowed
    │   ├── LossesNotAllowed       12   losses-not-allowed
    │   ├── SignerNotAllowed       12   signer-not-allowed
    │   ├── BaseNotAllowed         12   base-not-allowed
    │   ├── MethodNotAllowed       12   method-not-allowed
    │   ├── OutsideHours           12   outside-hours
    │   ├── RankLimit              12   rank-limit
    │   ├── StepsLimit             12   steps-limit
    │   ├── SizeLimit              12   size-limit
    │   ├── MemoryLimit            12   memory-limit
    │   ├── TrafficLimit           12   traffic-limit
    │   └── DiskLimit              12   disk-limit
    ├── FlowerPinError             13   wrong-flower-version
    ├── SealingError               14   bad-seal
    │   ├── WrongSignature         14   wrong-signature
    │   ├── WrongContext           14   wrong-context
    │   ├── TooLarge               14   too-large
    │   └── KeyLocked              14   key-locked
    ├── AggregationRefused         15   aggregation-refused
    │   ├── Interrupted            15   interrupted
    │   ├── OutOfOrder             15   out-of-order
    │   ├── TooFewClinics          15   too-few-clinics
    │   ├── WeakThreshold          15   weak-threshold
    │   ├── InconsistentLists      15   inconsistent-lists
    │   ├── OtherModelSent         15   other-model-sent
    │   ├── UnknownPeer            15   unknown-peer
    │   ├── AlreadyAggregated      15   already-aggregated
    │   ├── BadVector              15   bad-vector
    │   └── BadShare               15   bad-share
    ├── PrivacyError               16   privacy-refused
    │   ├── NotSeparable           16   not-separable
    │   ├── LedgerDamaged          16   ledger-damaged
    │   └── ReleaseRefused         16   release-refused
    ├── InferenceError             17   inference-failed
    │   ├── UnknownAdapter         17   unknown-adapter
    │   ├── PromptTooLong          17   prompt-too-long
    │   └── BadRequest             17   bad-request
    ├── EvidenceError              18   bad-evidence
    │   ├── AuditLogDamaged        18   audit-log-damaged
    │   └── LineageRefused         18   wrong-lineage
    └── StickRefused               19   stick-refused

Exit code 2 is a wrong command line, 130 a stop by Ctrl-C. Codes are never
reused. The *message* is one sentence for the person at this machine: what was
wrong, where, why, and what to do. It may name files and numbers, never record
text, patient ids or secrets, and it stays on this machine. The *reason* is the
only thing that another machine is told.
"""

from typing import ClassVar

INTERRUPTED_EXIT_CODE = 130


class FedpeftError(Exception):
    """Base of all errors that a user or another machine can cause."""

    exit_code: ClassVar[int] = 1
    reason: ClassVar[str] = "internal-error"


class ConfigError(FedpeftError):
    """A configuration file or ``--set`` value cannot be used."""

    exit_code = 3
    reason = "bad-config"


class DataError(FedpeftError):
    """A data file is missing, empty, or has a row that cannot be used."""

    exit_code = 4
    reason = "bad-data"


class ModelError(FedpeftError):
    """A base model directory cannot be used."""

    exit_code = 5
    reason = "bad-model"


class FingerprintMismatch(ModelError):
    """The base model here is not the one that the federation fine-tunes."""

    reason = "other-base-model"


class NotConvertible(ModelError):
    """A base model or adapter is sound, but cannot be written as GGUF; transformers can run it."""

    reason = "not-convertible"


class ExportDiffers(ModelError):
    """What was exported does not compute what the adapted model computes."""

    reason = "export-differs"


class AdapterError(FedpeftError):
    """An adapter cannot be built, read or written."""

    exit_code = 6
    reason = "bad-adapter"


class SchemaMismatch(AdapterError):
    """An adapter has other tensors, shapes, dtypes or base model than agreed."""

    reason = "wrong-adapter-schema"


class AdapterNotHeld(AdapterError):
    """A change came of an adapter that is not here; the whole one is needed."""

    reason = "adapter-not-held"


class TrainingError(FedpeftError):
    """Training could not go on."""

    exit_code = 7
    reason = "training-failed"


class NotFinite(TrainingError):
    """A loss, gradient or update holds NaN or infinity."""

    reason = "not-finite"


class AdapterUnchanged(TrainingError):
    """Training ran, yet the adapter is what it was before."""

    reason = "adapter-unchanged"


class FederationError(FedpeftError):
    """The federation cannot go on, for example with too few clinics."""

    exit_code = 8
    reason = "federation-failed"


class ConnectionFailed(FedpeftError):
    """The other side cannot be reached or trusted."""

    exit_code = 9
    reason = "connection-failed"


class PortInUse(ConnectionFailed):
    """The address that the server should listen on is taken."""

    reason = "port-in-use"


class CertificateRefused(ConnectionFailed):
    """The server's certificate was not issued by the CA of the invitation."""

    reason = "wrong-certificate"


class ClockSkew(ConnectionFailed):
    """The clocks of clinic and server differ by more than is accepted."""

    reason = "clock-skew"


class EnrolmentError(FedpeftError):
    """An invitation is expired, used, unknown or unreadable."""

    exit_code = 10
    reason = "not-enrolled"


class StorageError(FedpeftError):
    """A file cannot be written or a directory belongs to something else."""

    exit_code = 11
    reason = "storage-failed"


class PolicyRefused(FedpeftError):
    """The clinic's own limits forbid what the server asked for."""

    exit_code = 12
    reason = "refused-by-clinic"


class FlowerPinError(FedpeftError):
    """The installed Flower is not the pinned version that fedpeft was built on."""

    exit_code = 13
    reason = "wrong-flower-version"


class SecAggRequired(PolicyRefused):
    """The server wants to open this clinic's update by itself, and the clinic does not allow it."""

    reason = "secagg-required"


class BudgetSpent(PolicyRefused):
    """The clinic's own bound on privacy loss would be passed, or cannot be kept."""

    reason = "budget"


class UnitNotAllowed(PolicyRefused):
    """The job protects less than the clinic's people demand: records, and not patients."""

    reason = "unit-not-allowed"


class LossesNotAllowed(PolicyRefused):
    """The job asks for exact losses beside noise, and the clinic's people do not allow it."""

    reason = "losses-not-allowed"


class SignerNotAllowed(PolicyRefused):
    """The order comes from an identity that the clinic's people did not list."""

    reason = "signer-not-allowed"


class BaseNotAllowed(PolicyRefused):
    """The job is for a base model that the clinic's people did not agree to."""

    reason = "base-not-allowed"


class MethodNotAllowed(PolicyRefused):
    """The job trains an adapter in a way that the clinic's people did not agree to."""

    reason = "method-not-allowed"


class OutsideHours(PolicyRefused):
    """This box does not train at this time of day or week."""

    reason = "outside-hours"


class RankLimit(PolicyRefused):
    """The job's adapter has a higher rank than this box trains."""

    reason = "rank-limit"


class StepsLimit(PolicyRefused):
    """The job has more optimiser steps in a round than this box makes."""

    reason = "steps-limit"


class SizeLimit(PolicyRefused):
    """A message of the server is larger than this box takes in."""

    reason = "size-limit"


class MemoryLimit(PolicyRefused):
    """The job needs more memory than this box gives to it."""

    reason = "memory-limit"


class TrafficLimit(PolicyRefused):
    """What this box may send and receive on one day is used up."""

    reason = "traffic-limit"


class DiskLimit(PolicyRefused):
    """Less of the disk is free than this box keeps free."""

    reason = "disk-limit"


class SealingError(FedpeftError):
    """A sealed message or an identity cannot be read: damaged, forged, or not for this reader."""

    exit_code = 14
    reason = "bad-seal"


class WrongSignature(SealingError):
    """A message was not signed by the identity that was pinned at enrolment."""

    reason = "wrong-signature"


class WrongContext(SealingError):
    """A sealed message belongs to another federation, run, round, purpose, sender or receiver."""

    reason = "wrong-context"


class TooLarge(SealingError):
    """A sealed message is larger than this side takes in."""

    reason = "too-large"


class KeyLocked(SealingError):
    """A private key is encrypted and the passphrase or key file is missing or wrong."""

    reason = "key-locked"


class AggregationRefused(FedpeftError):
    """A step of the secure aggregation was refused; nothing was revealed by it."""

    exit_code = 15
    reason = "aggregation-refused"


class OutOfOrder(AggregationRefused):
    """A message does not belong to the present stage of the secure aggregation."""

    reason = "out-of-order"


class Interrupted(AggregationRefused):
    """A clinic's program ended in the midst of a step; the next one is asked for it again."""

    reason = "interrupted"


class TooFewClinics(AggregationRefused):
    """Fewer clinics are left than the threshold of the secure aggregation."""

    reason = "too-few-clinics"


class WeakThreshold(AggregationRefused):
    """The threshold is below what protects against the server that this clinic assumes."""

    reason = "weak-threshold"


class InconsistentLists(AggregationRefused):
    """The lists of clinics that the server sent contradict each other."""

    reason = "inconsistent-lists"


class OtherModelSent(AggregationRefused):
    """Clinics were given different adapters, jobs or lists of clinics in one round."""

    reason = "other-model-sent"


class UnknownPeer(AggregationRefused):
    """The server names a clinic whose identity is new or changed, and this clinic refuses it."""

    reason = "unknown-peer"


class AlreadyAggregated(AggregationRefused):
    """This clinic's update for the round is in a finished sum; another sum would tell more."""

    reason = "already-aggregated"


class BadVector(AggregationRefused):
    """Values cannot be quantised, or a masked vector has the wrong length or words."""

    reason = "bad-vector"


class BadShare(AggregationRefused):
    """A share of a secret does not belong to what was committed to."""

    reason = "bad-share"


class PrivacyError(FedpeftError):
    """A guarantee of differential privacy cannot be given, or its record is damaged."""

    exit_code = 16
    reason = "privacy-refused"


class NotSeparable(PrivacyError):
    """A record's gradient depends on other records, so no clip bounds its effect."""

    reason = "not-separable"


class LedgerDamaged(PrivacyError):
    """A row of the privacy ledger was changed, removed or put in another place."""

    reason = "ledger-damaged"


class ReleaseRefused(PrivacyError):
    """An adapter gives away more of its training records than the release allows."""

    reason = "release-refused"


class InferenceError(FedpeftError):
    """The engine that answers questions cannot start or cannot go on."""

    exit_code = 17
    reason = "inference-failed"


class UnknownAdapter(InferenceError):
    """An answer is asked of an adapter that this box does not have or cannot use."""

    reason = "unknown-adapter"


class PromptTooLong(InferenceError):
    """A prompt leaves no room for an answer in the context."""

    reason = "prompt-too-long"


class BadRequest(InferenceError):
    """A request for an answer has a value that cannot be used."""

    reason = "bad-request"


class EvidenceError(FedpeftError):
    """What should prove what happened cannot be trusted."""

    exit_code = 18
    reason = "bad-evidence"


class AuditLogDamaged(EvidenceError):
    """An entry of the audit log was changed, removed or put in another place."""

    reason = "audit-log-damaged"


class LineageRefused(EvidenceError):
    """An adapter is not what its signed lineage says, or its lineage is forged or missing."""

    reason = "wrong-lineage"


class StickRefused(FedpeftError):
    """A file that came on a stick is lost, old, doubled, foreign or damaged."""

    exit_code = 19
    reason = "stick-refused"


LASTING_REASONS = frozenset(
    error.reason
    for error in (
        AlreadyAggregated,
        AuditLogDamaged,
        BaseNotAllowed,
        BudgetSpent,
        ConfigError,
        DataError,
        FingerprintMismatch,
        LedgerDamaged,
        LossesNotAllowed,
        MethodNotAllowed,
        NotSeparable,
        PolicyRefused,
        PrivacyError,
        RankLimit,
        SecAggRequired,
        SignerNotAllowed,
        SizeLimit,
        StepsLimit,
        UnitNotAllowed,
    )
)
"""Reasons for which a clinic will refuse the same job again, until a person changes something."""
