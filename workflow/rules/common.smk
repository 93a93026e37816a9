"""What the rules share: the checked config, wildcard constraints, small accessors."""

import json
import os
import re

import simclr.config
import simclr.model_zoo
from simclr.benchmarks import BENCHMARKS, load

# A config file given on the command line replaces the default; Snakemake would merge the two.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


config_files = ", ".join(map(os.path.relpath, workflow.configfiles))
try:
    for file in workflow.configfiles:
        simclr.config.read_yaml(file)  # Snakemake takes the last of two equal keys in silence
    CONFIG = simclr.config.parse(simclr.config.Config, config, config_files)
except simclr.BadInput as error:
    raise WorkflowError(str(error))


# What the captions of the report say of each step.
config["about"] = {name: load(name).__doc__ for name in BENCHMARKS}


pathvars:
    results=str(CONFIG.output),


def any_of(names):
    """Return the regular expression that matches exactly these names, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def models_from(source):
    """Return the expression for the models whose backbone comes from this step."""
    return any_of(name for name, model in CONFIG.models.items() if model.source == source)


def models_pretrained(over_nodes):
    """Return the expression for the models that are pretrained over several nodes, or for the others."""
    return any_of(
        name for name, model in CONFIG.models.items() if model.pretrain and (model.nodes > 1) == over_nodes
    )


wildcard_constraints:
    model=any_of(CONFIG.models),
    dataset=any_of(type(CONFIG.datasets).model_fields),
    split="[a-z0-9]+",


def source_block(wildcards):
    """Return the config block of the model's source, as JSON: what decides whether its weights are stale."""
    return json.dumps(CONFIG.block("models", wildcards.model, CONFIG.models[wildcards.model].source))


def execution_block(wildcards, resources):
    """Return how a machine runs the model's recipe, as JSON; `resources` keeps it out of what is compared."""
    return CONFIG.models[wildcards.model].execution.model_dump_json(exclude_unset=True)


def benchmark_block(name):
    """Return a function of the wildcards that gives the benchmark's config block, as JSON."""

    def block(wildcards):
        if getattr(CONFIG.benchmarks, name) is None:
            raise WorkflowError(f"{name} is not under `benchmarks:`; add the line `{name}: {{}}` to run it")
        return json.dumps(CONFIG.block("benchmarks", name))

    return block


def detection_environment(name):
    """Return the file of the environment that a detection runs in: Detectron2's is for its own engine alone."""
    config = getattr(CONFIG.benchmarks, name)
    return f"../../envs/{'simclr' if config and config.engine == 'torchvision' else 'detectron2'}.yaml"


def feature_block(wildcards):
    """Return how the features of this dataset are extracted, as JSON."""
    return json.dumps(CONFIG.block("features", wildcards.dataset))


def dataset_block(wildcards):
    """Return where the dataset lies and what must be there, as JSON."""
    if CONFIG.dataset(wildcards.dataset) is None:
        raise WorkflowError(f"datasets.{wildcards.dataset}.root is not set; set it to the dataset's folder")
    return json.dumps(CONFIG.block("datasets", wildcards.dataset))


def page_records():
    """Return the record of every model and every benchmark that it runs: all of the page."""
    return [f"{CONFIG.output}/{model}/{benchmark}.json" for model, benchmark in CONFIG.pairs()]


def records(name):
    """Return a function that gives the records of one benchmark, for every model that runs it."""

    def of_models(wildcards):
        models = [model for model, benchmark in CONFIG.pairs() if benchmark == name]
        if not models:
            raise WorkflowError(f"no model runs {name}; add it under `benchmarks:` in the config")
        return [f"{CONFIG.output}/{model}/{name}.json" for model in models]

    return of_models


def section(name):
    """Return the section of the report that shows this, numbered as the report sorts by name."""
    shown = [("The page", ["page"]), ("Pretraining", ["pretrain"]), *simclr.model_zoo.sections()]
    return next(f"{number:02} {heading}" for number, (heading, names) in enumerate(shown) if name in names)


def reported(name, path, result):
    """Return an output of a step that the report shows, under the docstring of the step's module."""
    labels = {"model": "{model}", "benchmark": name, "result": result}
    return report(path, caption="../report/step.rst", category=section(name), labels=labels)


def record(name):
    """Return the output that is the record of a benchmark."""
    return reported(name, f"<results>/{{model}}/{name}.json", "record")


def picture(name, of="learning curves"):
    """Return the output that is the picture of a step."""
    return reported(name, f"<results>/{{model}}/{name}.png", of)


def best_layer(wildcards):
    """Return the record that knows the model's best layer; nothing where the SVMs do not run, or are not asked."""
    lowshot = CONFIG.benchmarks.voc07_lowshot
    wanted = lowshot and lowshot.layer == "best" and "voc07_svm" in CONFIG.runs(wildcards.model)
    return f"{CONFIG.output}/{wildcards.model}/voc07_svm.json" if wanted else []


def work_folder(step):
    """Return where a training keeps what a kill must not lose; no output, or a rerun would delete it."""
    return f"{CONFIG.output}/{{model}}/work/{step}"
