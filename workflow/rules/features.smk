# Frozen features, extracted once and shared by the benchmarks that only need them.
rule features:
    """Run the backbone once over a split; the folder holds one array per layer, and its manifest.

    The number of GPUs is a resource, not a param: they share the images, the features do not change.
    """
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/{dataset}.json",
    output:
        directory("<results>/{model}/features/{dataset}-{split}"),
    log:
        "<results>/{model}/logs/features_{dataset}-{split}.log",
    benchmark:
        "<results>/{model}/times/features_{dataset}-{split}.tsv"
    wildcard_constraints:
        dataset=any_of(type(CONFIG.features).model_fields),
    conda:
        "../../envs/simclr.yaml"
    threads: cores(feature_gpus)
    resources:
        gpu=feature_gpus,
        mem_mb=megabytes(8_000, per_gpu=8_000, gpus=feature_gpus),
        runtime=minutes(
            lambda wildcards: images(wildcards.dataset, wildcards.split), per_second=300, gpus=feature_gpus
        ),
    params:
        config=feature_block,
        work=work_folder("features_{dataset}-{split}"),
        python=launcher,
    shell:
        "{params.python} -m simclr features --backbone {input.backbone} --dataset {input.dataset}"
        " --split {wildcards.split} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
