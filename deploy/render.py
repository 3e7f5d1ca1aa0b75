"""`python deploy/render.py`: lint the chart with Helm itself and render it into deploy/kubernetes/.

It needs `pip install helm-python-sdk kubernetes-validate`, in an environment of its own: the first
is 240 MB, Helm 4 as a library, without a cluster or a helm command. tests/test_deploy_files.py
needs neither: it holds the manifests to the chart by its digest, and to what the pods may do.
"""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHART = HERE / "helm" / "fedaccord"
RUN = {"role": "coordinator", "run": True}
SITE = {
    "role": "site",
    "site": {
        "name": "cleveland",
        "coordinator": {"cidrs": ["203.0.113.7/32"]},
        "dataClaim": "registry",
    },
}
# What is kept: the file's name, the release's, and the values.
CASES = {
    "coordinator-kit": ("coordinator", RUN | {"run": False}),
    "coordinator": ("coordinator", RUN),
    "site-kit": ("cleveland", SITE | {"run": False}),
    "site": ("cleveland", SITE | {"run": True}),
}
MORE = {  # linted and validated, not kept
    "metrics": RUN
    | {
        "coordinator": {
            "metrics": {"port": 9464},
            "from": ["198.51.100.0/24"],
            "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        }
    },
    "in cluster": {
        "role": "site",
        "run": True,
        "site": {"name": "va", "coordinator": {"inCluster": True}, "dns": False},
        "storage": {"className": "fast"},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
    },
}
WRONG = {  # refused, with these words
    "at '/role'": {"role": "", "run": True},
    "Name the coordinator's address": {"role": "site", "run": True, "site": {"name": "va"}},
    "Name the site": SITE | {"run": True, "site": SITE["site"] | {"name": ""}},
    "additional properties 'rum'": RUN | {"rum": 1},
}


def digest() -> str:
    """Digest of all files of the chart, by path and content."""
    mark = sha256()
    for path in sorted(p for p in CHART.rglob("*") if p.is_file()):
        mark.update(f"{path.relative_to(CHART).as_posix()}\n".encode() + path.read_bytes() + b"\0")
    return mark.hexdigest()


def rendered(values: dict, release: str) -> str:
    """Lint and render the chart with some values; its manifests in the order of their names."""
    import helm_python as helm

    report = helm.lint(CHART, values, strict=True)
    faults = [m for m in report["messages"] if m["severity"] > 1] + report["errors"]
    if faults:
        raise SystemExit(f"{values}: {faults}")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        made = chart.render(values, name=release, namespace="fedaccord")
    parts = [text.strip() for name, text in sorted(made.items()) if name.endswith(".yaml")]
    return "\n---\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Render, validate against Kubernetes' own schemas, and write what is kept."""
    import helm_python as helm

    folder = HERE / "kubernetes"
    folder.mkdir(exist_ok=True)
    kept = []
    for name, (release, values) in CASES.items():
        head = f"# Made by `python deploy/render.py` from the chart {digest()}.\n"
        path = folder / f"{name}.yaml"
        path.write_text(head + rendered(values, release), encoding="utf-8")
        kept.append(path)
    extra = [rendered(values, "fedaccord") for values in MORE.values()]
    for words, values in WRONG.items():
        try:
            rendered(values, "fedaccord")
        except (SystemExit, helm.HelmError) as refusal:
            if words not in str(refusal):
                raise
        else:
            raise SystemExit(f"{values} should be refused: {words}")
    print(f"helm {helm.helm_sdk_version()}: {len(CASES) + len(MORE)} renderings linted")
    for release in ("1.25.0", "1.37.0"):
        tool = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", "--quiet"]
        text = "---\n".join([path.read_text(encoding="utf-8") for path in kept] + extra)
        subprocess.run([*tool, "-k", release, "/dev/stdin"], input=text, text=True, check=True)
        print(f"kubernetes-validate --strict -k {release}: no fault")


if __name__ == "__main__":
    main()
