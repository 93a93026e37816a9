# Verify each dataset's layout, counts and lists before anything is trained on it.
if CONFIG.demo_data:

    rule demo:
        """Make the miniature datasets, in the layouts of the real ones; demo.json is written last."""
        output:
            f"{CONFIG.demo_data}/demo.json",
        log:
            "<results>/datasets/demo.log",
        benchmark:
            "<results>/datasets/demo.tsv"
        conda:
            "../../envs/simclr.yaml"
        resources:
            mem_mb=megabytes(2_000),
            runtime=minutes(),
        params:
            folder=lambda wildcards, output: os.path.dirname(output[0]),
        shell:
            "python -m simclr demo --output {params.folder:q} > {log} 2>&1"


rule datasets:
    """The manifest of every dataset that the config names: what to run first on a new machine."""
    input:
        [
            f"<results>/datasets/{name}.json"
            for name in type(CONFIG.datasets).model_fields
            if CONFIG.dataset(name)
        ],


rule dataset:
    """Verify one dataset against what the config expects of it; the manifest goes into every record.

    The index of each split, which is written beside it, is no output: where it is missing, folders are listed.
    """
    input:
        demo=rules.demo.output if CONFIG.demo_data else [],
    output:
        # Kept until the new one is written, and where it is not: pretraining never runs again for want of it.
        update("<results>/datasets/{dataset}.json"),
    log:
        "<results>/datasets/{dataset}.log",
    benchmark:
        "<results>/datasets/{dataset}.tsv"
    conda:
        "../../envs/simclr.yaml"
    resources:
        # COCO's annotations are in one file.
        mem_mb=megabytes(
            lambda wildcards: 1_500
            + images(wildcards.dataset) // (30 if wildcards.dataset == "coco2017" else 500)
        ),
        runtime=minutes(lambda wildcards: images(wildcards.dataset), per_second=300),
    params:
        config=dataset_block,
    shell:
        "python -m simclr datasets --name {wildcards.dataset} --config {params.config:q} --output {output}"
        " > {log} 2>&1"
