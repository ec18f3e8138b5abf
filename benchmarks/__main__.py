"""`python -m benchmarks [QUESTION …]`; see `runner` for the options and `questions` for the questions."""

import sys

from benchmarks.runner import main

if __name__ == "__main__":
    sys.exit(main())
