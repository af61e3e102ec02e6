"""What helm makes of a chart and values."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

CHARTS = Path(__file__).parents[2] / "charts"
FLOOR = "1.32.0"  # of Kubernetes; a helm that was built from its sources does not know what it renders for
NAMESPACE = "site"

# Sets of values, by what they are about, as people set them. Together they use every template.
AGENT: Json = {
    "aggregator": "merge.example.org:8443",
    "data": {"hostPath": "/srv/images"},
    "tls": {"secret": "north-tls"},
}
SCHEDULING: Json = {
    "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    },
    "priorityClassName": "low",
    "podAnnotations": {"example.org/owner": "radiology"},
    "podLabels": {"team": "radiology"},
    "extraEnv": [{"name": "OMP_NUM_THREADS", "value": "4"}],
}
AGENTS: dict[str, Json] = {
    "three values": AGENT,
    "job": {**AGENT, "mode": "job"},
    "cronjob": {**AGENT, "mode": "cronjob", "cronjob": {"timeZone": "Europe/Berlin", "schedule": "30 1 * * 1-5"}},
    "nfs": {**AGENT, "data": {"nfs": {"server": "nas.example.org", "path": "/export"}, "path": "brain-mri"}},
    "existing claims": {
        **AGENT,
        "data": {"existingClaim": "images", "path": "manifest.csv"},
        "state": {"existingClaim": "north-state-2"},
    },
    "gpu": {
        **AGENT,
        "mode": "job",
        "gpu": {"count": 2, "runtimeClassName": "nvidia"},
        "training": {"device": "cuda", "workers": 4, "learningRate": 0.0003, "epochs": 1000000},
        "sharedMemory": "8Gi",
    },
    "scheduling": {**AGENT, **SCHEDULING, "imagePullSecrets": [{"name": "registry"}], "supplementalGroups": [5000]},
    "scheduled cronjob": {**AGENT, **SCHEDULING, "mode": "cronjob"},
    "proxy": {
        **AGENT,
        "proxy": {"https": "http://proxy:3128", "noProxy": "10.0.0.0/8"},
        "networkPolicy": {"to": [{"ipBlock": {"cidr": "203.0.113.7/32"}}]},
    },
    "proxy with a password": {
        **AGENT,
        "proxy": {"existingSecret": "proxy"},
        "networkPolicy": {"extraPorts": [3128], "metricsNamespaces": []},
    },
    "no network policy": {**AGENT, "networkPolicy": {"enabled": False}},
    "cert-manager": {
        **AGENT,
        "hospital": "north",
        "tls": {"trustDomain": "example.org", "certManager": {"issuerRef": {"name": "datavector"}}},
    },
    "another policy": {**AGENT, "policy": "brain-mri", "base": f"sha256:{'0' * 64}", "tasks": {"recalibrate": False}},
    "storage": {**AGENT, "state": {"size": "100Gi", "storageClassName": "fast", "accessModes": ["ReadWriteOncePod"]}},
}
AGGREGATOR: Json = {"tls": {"secret": "aggregator-tls"}}
POLICY: Json = {
    "baseModelRef": "tiny",
    "trigger": {"minHospitals": 3},
    "job": {"nodeSelector": {"pool": "batch"}},
}
BASE_MODEL: Json = {
    "architecture": "efficientnet_lite0",
    "classes": ["no", "yes"],
    "inputSize": 128,
    "artifactDigest": f"sha256:{'0' * 64}",
}
AGGREGATORS: dict[str, Json] = {
    "one value": AGGREGATOR,
    "load balancer": {
        **AGGREGATOR,
        "service": {
            "type": "LoadBalancer",
            "port": 443,
            "nodePort": 30443,
            "annotations": {"example.org/scheme": "internal"},
            "loadBalancerClass": "example.org/tcp",
            "loadBalancerSourceRanges": ["203.0.113.0/24"],
            "externalTrafficPolicy": "Local",
        },
    },
    "node port": {**AGGREGATOR, "service": {"type": "NodePort"}},
    "shared storage": {
        **AGGREGATOR,
        "store": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs", "size": "1Ti"},
    },
    "existing claim": {**AGGREGATOR, "store": {"existingClaim": "store"}},
    "scheduling": {
        **AGGREGATOR,
        "receiver": SCHEDULING,
        "operator": SCHEDULING,
        "imagePullSecrets": [{"name": "registry"}],
    },
    "denied": {**AGGREGATOR, "denied": ["south", "0" * 64]},
    "objects": {**AGGREGATOR, "policies": {"brain-mri": POLICY}, "baseModels": {"tiny": BASE_MODEL}},
    "limits": {**AGGREGATOR, "limits": {"calls": 1000000, "pollSeconds": 0.5}},
    "network": {
        **AGGREGATOR,
        "networkPolicy": {
            "exchangeFrom": [{"ipBlock": {"cidr": "203.0.113.0/24"}}],
            "apiServerPorts": [6443],
            "metricsNamespaces": [],
        },
    },
    "no network policy": {**AGGREGATOR, "networkPolicy": {"enabled": False}},
    "disruption": {**AGGREGATOR, "podDisruptionBudget": {"enabled": True}},
    "monitoring": {
        **AGGREGATOR,
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "cert-manager": {
        "tls": {
            "trustDomain": "example.org",
            "serverName": "merge.example.org",
            "certManager": {"issuerRef": {"name": "datavector"}, "dnsNames": ["merge.example.org"]},
        }
    },
}
SETS = [("agent", name, values) for name, values in AGENTS.items()] + [
    ("aggregator", name, values) for name, values in AGGREGATORS.items()
]
SET_IDS = [f"{chart}: {name}" for chart, name, _ in SETS]


class HelmFailed(Exception):
    """helm ended with an error; the message is what it printed."""


def run_helm(helm: Path, *args: str, values: Json | None = None, kubeconfig: Path | None = None) -> str:
    """Runs helm, with values on its standard input, and returns what it printed.

    Raises:
        HelmFailed: it failed.
    """
    command = [str(helm), *args, *(["--values=-"] if values is not None else [])]
    environment = {"KUBECONFIG": str(kubeconfig or "/dev/null"), "HOME": "/nonexistent"}
    answer = subprocess.run(command, input=json.dumps(values), env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise HelmFailed(answer.stderr.strip() or answer.stdout.strip())
    return answer.stdout


def render(helm: Path, chart: str, values: Json, *args: str, release: str = "north") -> list[Json]:
    """The objects of a chart, those of its tests included."""
    text = run_helm(
        helm, "template", release, str(CHARTS / chart), f"--kube-version={FLOOR}", f"--namespace={NAMESPACE}", *args,
        values=values,
    )  # fmt: skip
    return [each for each in yaml.safe_load_all(text) if each]


def find(objects: list[Json], kind: str, name: str | None = None) -> Json:
    """The one object of a kind, or of a kind and a name."""
    (found,) = (each for each in objects if each["kind"] == kind and (name is None or each["metadata"]["name"] == name))
    return found


def pod_of(workload: Json) -> Json | None:
    """The metadata and spec of the Pods that an object makes, or is."""
    spec = workload.get("spec", {})
    match workload["kind"]:
        case "Pod":
            return {"metadata": workload["metadata"], "spec": spec}
        case "Deployment" | "Job":
            template: Json = spec["template"]
            return template
        case "CronJob":
            return pod_of({"kind": "Job", "spec": spec["jobTemplate"]["spec"]})
    return None


def environment(pod: Json) -> dict[str, str]:
    """The plain environment variables of a Pod's first container."""
    return {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"] if "value" in each}
