"""`python -m hwpoison` is the command `hwpoison`."""

import sys

from hwpoison.cli import main

if __name__ == "__main__":
    sys.exit(main())
