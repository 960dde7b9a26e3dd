"""`python -m fasttricks.info` (the package's attribute `info` is the function; this file only runs it)."""

from .diagnostics import main

if __name__ == "__main__":
    main()
