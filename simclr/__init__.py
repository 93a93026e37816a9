"""SimCLR: pretraining and every benchmark of its model-zoo page, as a library.

The steps are functions; `python -m simclr <step>` runs one by name; `workflow/` says when each runs. Where to
find what, in the order in which data passes:

- images on disk: `datasets`, `layouts`, `paths`, `shards`, `masks`; the miniature: `demo`
- views and batches: `transforms`, `augment`, `stream`, `loading`
- pretraining: `pretrain`, `model`, `loss`, `optim`, `online_knn`, `training_log`
- what becomes of a backbone: `checkpoint`, `convert`, `features`
- the protocols: `benchmarks/`, of `protocol` and `metrics`
- numbers and page: `results`, `files` (written whole or not at all), `model_zoo`, `render`
- config and command line: `config`, `schema`, `__main__`
- machines: `devices`, `distributed`, `rolling` (stopping and going on), `slurm`, `jobs` (plan and summary)
"""

__version__ = "0.1.0"


class BadInput(ValueError):
    """The user's input cannot be used; the message says what was expected, what was found, what to type.

    The command line prints the message as one line and exits with status 2.
    """
