"""`python -m datavector` is the command `datavector`."""

from datavector.cli import main

if __name__ == "__main__":
    main()
