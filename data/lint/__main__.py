"""`python -m data.lint`: the same as `lathe lint`, whose settings are those of a run."""

import sys

from lathe import main

if __name__ == "__main__":
    sys.exit(main(["lint", *sys.argv[1:]]))
