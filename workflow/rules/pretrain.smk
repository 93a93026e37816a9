# Every model gets its backbone from one of three sources.
rule pretrain:
    """Pretrain with SimCLR. What a kill must not lose lies in the work folder; the output is only ever whole.

    Beside the outputs it writes pretrain.json, which the page shows; a backbone without one is not trained again.
    How a machine runs it must not decide whether it is stale: the number of GPUs is a resource, and the model's
    `execution:` block a param that depends on one, which Snakemake does not compare.
    """
    input:
        # A dataset verified again is no reason to train again; other images are: raise the recipe's version.
        dataset=ancient("<results>/datasets/imagenet.json"),
    output:
        backbone="<results>/{model}/backbone.safetensors",
        loss="<results>/{model}/pretrain.csv",
        picture=picture("pretrain"),
    log:
        "<results>/{model}/logs/pretrain.log",
    benchmark:
        "<results>/{model}/times/pretrain.tsv"
    wildcard_constraints:
        model=models_pretrained(over_nodes=False),
    priority: 1  # the longest way to the page begins first
    conda:
        "../../envs/simclr.yaml"
    threads: lambda wildcards: CORES_PER_GPU * gpus(wildcards) or HALF_THE_CORES
    resources:
        gpu=gpus,
        mem_mb=megabytes(3_000, per_gpu=16_000, gpus=gpus),
        runtime=minutes(pretrained_on, per_second=300, gpus=gpus),
    params:
        config=source_block,
        work=work_folder("pretrain"),
        execution=execution_block,
        python=launcher,
    shell:
        "{params.python} -m simclr pretrain --dataset {input.dataset} --config {params.config:q}"
        " --execution {params.execution:q} --work {params.work:q} --output {output.backbone} > {log} 2>&1"


use rule pretrain as pretrain_over_nodes with:
    wildcard_constraints:
        model=models_pretrained(over_nodes=True),
    threads: CORES_PER_GPU
    resources:
        gres=lambda wildcards: f"gpu:{node_gpus(wildcards)}",
        nodes=nodes,
        # By their number alone Slurm would fill the first node with tasks; the executor refuses one per node.
        tasks_per_node=lambda wildcards: node_gpus(wildcards) if node_gpus(wildcards) > 1 else None,
        tasks=lambda wildcards: nodes(wildcards) if node_gpus(wildcards) == 1 else None,
        tasks_per_gpu=0,  # else the executor would start `tasks` of them for each GPU
        cpus_per_task=CORES_PER_GPU,
        mpi="srun",
        mem_mb=megabytes(3_000, per_gpu=16_000, gpus=gpus),
        runtime=minutes(pretrained_on, per_second=300, gpus=gpus),
    params:
        python=launcher_over_nodes,


rule import_checkpoint:
    """Take in an existing checkpoint; every tensor is accounted for in the certificate.

    Where Snakemake runs, since it may have to be downloaded, and the nodes of a cluster often have no internet.
    """
    output:
        backbone="<results>/{model}/backbone.safetensors",
        certificate="<results>/{model}/backbone.certificate.json",
    log:
        "<results>/{model}/logs/import_checkpoint.log",
    benchmark:
        "<results>/{model}/times/import_checkpoint.tsv"
    wildcard_constraints:
        model=models_from("import_checkpoint"),
    localrule: True
    conda:
        "../../envs/simclr.yaml"
    resources:
        mem_mb=megabytes(3_000),
        runtime=minutes(),
    params:
        config=source_block,
    shell:
        "python -m simclr import_checkpoint --config {params.config:q} --output {output.backbone} > {log} 2>&1"


rule random_init:
    """Random weights: the floor of every benchmark."""
    output:
        backbone="<results>/{model}/backbone.safetensors",
    log:
        "<results>/{model}/logs/random_init.log",
    benchmark:
        "<results>/{model}/times/random_init.tsv"
    wildcard_constraints:
        model=models_from("random_init"),
    conda:
        "../../envs/simclr.yaml"
    resources:
        mem_mb=megabytes(2_000),
        runtime=minutes(),
    params:
        config=source_block,
    shell:
        "python -m simclr random_init --config {params.config:q} --output {output.backbone} > {log} 2>&1"
