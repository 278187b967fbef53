"""The names of what is asked and of what a clinic reports."""

TRAIN = "train"
EVALUATE = "evaluate"
KINDS = (TRAIN, EVALUATE)

NUM_EXAMPLES = "num-examples"
"""Training rows of the clinic: its weight in the mean."""
TRAIN_NLL, TRAIN_TOKENS = "train-nll", "train-tokens"
VALID_NLL, VALID_TOKENS = "valid-nll", "valid-tokens"
VERDICT = "verdict"
"""1 if the clinic has taken the adapter into use, 0 if not; only of clinics that tell."""
