"""SimCLR: pretraining and every benchmark of its model-zoo page, as a library.

The steps are functions; `python -m simclr <step>` runs one by name; `workflow/` says when each runs.
"""

__version__ = "0.1.0"


class BadInput(ValueError):
    """The user's input cannot be used; the message says what was expected, what was found, what to type.

    The command line prints the message as one line and exits with status 2.
    """
