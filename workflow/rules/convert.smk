# A backbone in other frameworks' key names, each with the certificate that all of it arrived.
rule convert:
    """Every model's backbone in every format."""
    input:
        expand("<results>/{model}/backbone_{format}.pth", model=CONFIG.models, format=["detectron2", "mmseg"]),


rule convert_backbone:
    """Write one backbone for one framework, and the certificate that compares it with the source."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
    output:
        weights="<results>/{model}/backbone_{format}.pth",
        certificate="<results>/{model}/backbone_{format}.certificate.json",
    log:
        "<results>/{model}/logs/convert_{format}.log",
    benchmark:
        "<results>/{model}/times/convert_{format}.tsv"
    wildcard_constraints:
        format="detectron2|mmseg",
    conda:
        "../../envs/{format}.yaml"
    resources:
        mem_mb=megabytes(3_000),
        runtime=minutes(),
    shell:
        "python -m simclr convert --backbone {input.backbone} --format {wildcards.format}"
        " --output {output.weights} > {log} 2>&1"
