"""`python -m trapo_train`, and `torchrun -m trapo_train`: the command line."""

from trapo_train.cli import entry

if __name__ == "__main__":  # not where a worker process imports it
    entry()
