"""``python -m barlow`` is ``barlow``."""

from barlow.cli import main

if __name__ == "__main__":
    main()
