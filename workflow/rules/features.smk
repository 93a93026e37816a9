# Frozen features, extracted once and shared by the benchmarks that only need them.
rule features:
    """Run the backbone once over a split; the folder holds one array per layer, and its manifest."""
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
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: 8_000 * attempt,
        runtime=lambda wildcards, attempt: attempt
        * minutes(images(wildcards.dataset, wildcards.split), per_second=300),
    params:
        config=feature_block,
    shell:
        "python -m simclr features --backbone {input.backbone} --dataset {input.dataset}"
        " --split {wildcards.split} --config {params.config:q} --output {output} > {log} 2>&1"
