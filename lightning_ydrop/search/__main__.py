"""`python -m lightning_ydrop.search`: see `program.py`."""

from lightning_ydrop.search.program import main

if __name__ == "__main__":
    main()
