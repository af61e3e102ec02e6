"""What the charts make of values, and what they say to wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from agent.settings import PREFIX, AgentSettings
from aggregator.settings import Limits
from datavector.config import load_settings
from tests.charts import check_values
from tests.charts.rendering import (
    AGENT,
    AGENTS,
    AGGREGATOR,
    AGGREGATORS,
    CHARTS,
    FLOOR,
    SET_IDS,
    SETS,
    HelmFailed,
    Json,
    environment,
    find,
    pod_of,
    render,
    run_helm,
)

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(("chart", "name", "values"), [*SETS, ("crds", "", {})], ids=[*SET_IDS, "crds"])
def test_helm_finds_nothing_to_say_about_a_chart(helm: Path, chart: str, name: str, values: Json):
    said = run_helm(helm, "lint", "--strict", f"--kube-version={FLOOR}", str(CHARTS / chart), values=values)
    assert "WARNING" not in said
    assert "ERROR" not in said


def test_values_schemas_and_readmes_agree():
    assert check_values.stale() == []


# --- Wrong values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"aggregator": ""}, "aggregator is not set"),
        ({"aggregator": "merge.example.org"}, 'aggregator is "merge.example.org", but must be host:port'),
        ({"hospital": "North"}, 'hospital is "North"'),
        ({"base": "sha256:1"}, 'base is "sha256:1"'),
        ({"data": {}}, "set one of data.hostPath, data.nfs and data.existingClaim"),
        ({"data": {"hostPath": "/a", "existingClaim": "b"}}, "exclude one another"),
        ({"data": {"hostPath": "images"}}, 'data.hostPath is "images"'),
        ({"data": {"nfs": {"server": "nas"}}}, "data.nfs.path"),
        ({"data": {"hostPath": "/a", "path": "/b"}}, 'data.path is "/b"'),
        ({"data": {"hostPath": "/a", "path": "b/../../c"}}, 'data.path is "b/../../c"'),
        ({"data": {"hostPath": "/a", "validation": 1}}, "/data/validation"),
        ({"data": {"hostPath": "/a", "validation": "1.5"}}, "data.validation is 1.5"),
        ({"data": {"hostPath": "/a", "maxCorrupt": "1.5"}}, "data.maxCorrupt is 1.5"),
        ({"data": {"folder": "/a"}}, "'folder' not allowed"),
        ({"data": {"hostPath": "/a", "nfs": None}}, "'nfs'"),
        ({"training": None}, "'training'"),
        ({"aggregator": None}, "'aggregator'"),
        ({"tls": {}}, "set tls.secret"),
        ({"tls": {"secret": "a", "certManager": {"issuerRef": {"name": "b"}}}}, "exclude one another"),
        ({"tls": {"certManager": {"issuerRef": {"name": "b"}}}}, "hospital is not set"),
        ({"tls": {"secret": "North_TLS"}}, "/tls/secret"),
        ({"mode": "daemon"}, "/mode"),
        ({"training": {"epochs": 0}}, "/training/epochs"),
        ({"training": {"epochs": 1.5}}, "/training/epochs"),
        ({"training": {"learningRate": 0.01}}, "/training/learningRate"),
        ({"training": {"learningRate": "0.01"}}, "training.learningRate is 0.01"),
        ({"training": {"learningRate": "fast"}}, "/training/learningRate"),
        ({"training": {"batch_size": 8}}, "'batch_size' not allowed"),
        ({"tasks": {"recalibrate": "no"}}, "/tasks/recalibrate"),
        ({"gpu": {"count": "all"}}, "/gpu/count"),
        ({"state": {"size": "20GB"}}, "/state/size"),
        ({"state": {"accessModes": ["ReadOnlyMany"]}}, "/state/accessModes"),
        ({"cronjob": {"schedule": "nightly"}}, "/cronjob/schedule"),
        ({"proxy": {"https": "http://p:1", "existingSecret": "p"}}, "proxy.https and proxy.existingSecret"),
        ({"proxy": {"https": "http://me:secret@p:1"}}, "set proxy.existingSecret"),
        ({"proxy": {"https": "socks5://p:1"}}, 'proxy.https is "socks5://p:1"'),
        ({"proxy": {"existingSecret": "p"}}, "networkPolicy.extraPorts must have the proxy's port"),
        ({"networkPolicy": {"extraPorts": [70000]}}, "/networkPolicy/extraPorts"),
        ({"extraEnv": [{"value": "a"}]}, "/extraEnv"),
        ({"trainig": {"epochs": 3}}, "'trainig' not allowed"),
    ],
    ids=str,
)
def test_a_wrong_value_of_the_agent_is_refused_by_its_name(helm: Path, change: Json, named: str):
    with pytest.raises(HelmFailed) as refusal:
        render(helm, "agent", {**AGENT, **change})
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "set tls.secret"),
        ({"tls": {"secret": "a", "certManager": {"issuerRef": {"name": "b"}}}}, "exclude one another"),
        ({**AGGREGATOR, "service": {"type": "Ingress"}}, "/service/type"),
        ({**AGGREGATOR, "service": {"nodePort": 30000}}, "service.nodePort needs service.type"),
        ({**AGGREGATOR, "service": {"port": 0}}, "/service/port"),
        ({**AGGREGATOR, "denied": ["South!"]}, 'denied has "South!"'),
        ({**AGGREGATOR, "denied": "south"}, "/denied"),
        ({**AGGREGATOR, "denied": None}, "'denied'"),
        ({**AGGREGATOR, "policies": {"Brain_MRI": {}}}, 'policies has the name "Brain_MRI"'),
        ({**AGGREGATOR, "policies": {"brain": "tiny"}}, "/policies/brain"),
        ({**AGGREGATOR, "baseModels": {"Tiny": {}}}, 'baseModels has the name "Tiny"'),
        ({**AGGREGATOR, "limits": {"calls": 0}}, "/limits/calls"),
        ({**AGGREGATOR, "limits": {"uploads": 3}}, "'uploads' not allowed"),
        ({**AGGREGATOR, "store": {"size": "big"}}, "/store/size"),
        ({**AGGREGATOR, "operator": {"replicas": 2}}, "'replicas' not allowed"),
        ({**AGGREGATOR, "networkPolicy": {"apiServerPorts": []}}, "/networkPolicy/apiServerPorts"),
        ({**AGGREGATOR, "serviceMonitor": {"interval": "often"}}, "/serviceMonitor/interval"),
    ],
    ids=str,
)
def test_a_wrong_value_of_the_aggregator_is_refused_by_its_name(helm: Path, values: Json, named: str):
    with pytest.raises(HelmFailed) as refusal:
        render(helm, "aggregator", values)
    assert named in str(refusal.value)


# --- The agent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGENTS)
def test_the_agent_understands_its_environment(helm: Path, name: str):
    pod = agent_pod(render(helm, "agent", {"hospital": "north", **AGENTS[name]}))
    settings = load_settings(AgentSettings, None, {}, prefix=PREFIX, environment=environment(pod))
    assert settings.hospital == "north"
    assert settings.aggregator == "merge.example.org:8443"


def test_every_setting_of_the_agent_is_a_value_with_the_same_default(helm: Path):
    pod = agent_pod(render(helm, "agent", {"hospital": "north", **AGENT}))
    ours = load_settings(AgentSettings, None, {}, prefix=PREFIX, environment=environment(pod)).model_dump()
    plain = AgentSettings.model_validate(
        {
            "hospital": "north",
            "aggregator": AGENT["aggregator"],
            "state": "/state",
            "metrics_port": 9090,
            "data": {"path": "/data"},
            "tls": {"certificate": "/tls/tls.crt", "key": "/tls/tls.key", "ca": "/tls/ca.crt"},
        }
    )
    assert ours == plain.model_dump()
    values = yaml.safe_load((CHARTS / "agent" / "values.yaml").read_text())
    for group in ("training", "tasks"):
        assert {snake(key) for key in values[group]} == ours[group].keys()


def test_what_is_set_reaches_the_agent(helm: Path):
    values = {"mode": "job", "data": {"hostPath": "/a", "path": "b/manifest.csv"}, "policy": "p", "base": DIGEST}
    training = {"epochs": 1000000, "learningRate": "0.0003", "device": "cuda"}
    pod = agent_pod(render(helm, "agent", {**AGENT, **values, "hospital": "north", "training": training}))
    settings = load_settings(AgentSettings, None, {}, prefix=PREFIX, environment=environment(pod))
    assert settings.data is not None
    assert str(settings.data.path) == "/data/b/manifest.csv"
    assert (settings.policy, settings.base) == ("p", DIGEST)
    assert (settings.training.epochs, settings.training.learning_rate) == (1000000, 0.0003)
    assert settings.training.device == "cuda"


@pytest.mark.parametrize(
    ("mode", "commands"),
    [
        ("deployment", [["agent"]]),
        ("job", [["agent", "--once"]]),
        ("cronjob", [["agent", "--once"], ["agent", "--tasks-only"]]),
    ],
)
def test_a_mode_runs_these_commands_one_after_the_other(helm: Path, mode: str, commands: list[list[str]]):
    spec = agent_pod(render(helm, "agent", {**AGENT, "mode": mode}))["spec"]
    assert [each["args"] for each in [*spec.get("initContainers", []), *spec["containers"]]] == commands


def test_a_job_keeps_its_name_until_its_spec_changes(helm: Path):
    def job(**change: object) -> Json:
        return find(render(helm, "agent", {**AGENT, "mode": "job", **change}), "Job")

    first, same = job(), job(networkPolicy={"enabled": False})
    assert first == same
    for change in ({"training": {"epochs": 3}}, {"job": {"backoffLimit": 1}}, {"image": {"tag": "2"}}):
        assert job(**change)["metadata"]["name"] != first["metadata"]["name"]


def test_a_new_version_of_the_chart_alone_makes_no_new_job(helm: Path, tmp_path: Path):
    chart = tmp_path / "agent"
    chart.mkdir()
    for path in (CHARTS / "agent").rglob("*"):
        if path.is_file():
            (chart / path.relative_to(CHARTS / "agent")).parent.mkdir(parents=True, exist_ok=True)
            (chart / path.relative_to(CHARTS / "agent")).write_bytes(path.read_bytes())
    about = chart / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: ", "\nversion: 9"))
    values = {**AGENT, "mode": "job"}
    assert find(render(helm, str(chart), values), "Job")["spec"] == find(render(helm, "agent", values), "Job")["spec"]


def test_a_longest_release_name_fits_everywhere(helm: Path):
    for chart, values in (("agent", {**AGENT, "mode": "job"}), ("aggregator", AGGREGATOR)):
        for each in render(helm, chart, values, release="r" * 53):
            if not each["kind"].startswith("PersistentVolume"):  # those may have 253 characters
                assert len(each["metadata"]["name"]) <= 63
    with pytest.raises(HelmFailed, match="too long for mode cronjob"):
        render(helm, "agent", {**AGENT, "mode": "cronjob"}, release="r" * 53)


def test_another_folder_is_another_volume(helm: Path):
    def claim(folder: str) -> Json:
        objects = render(helm, "agent", {**AGENT, "data": {"hostPath": folder}})
        return find(objects, "PersistentVolume")

    assert claim("/a")["metadata"]["name"] != claim("/b")["metadata"]["name"]
    assert claim("/a") == claim("/a")


def test_a_gpu_is_asked_for_where_the_agent_trains_and_nowhere_else(helm: Path):
    objects = render(helm, "agent", AGENTS["gpu"])
    spec = agent_pod(objects)["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert spec["runtimeClassName"] == "nvidia"
    preflight = find(objects, "Pod")
    assert "resources" not in preflight["spec"]["containers"][0]
    assert environment(preflight)[f"{PREFIX}TRAINING__DEVICE"] == "cpu"


def test_a_pod_that_asks_for_no_gpu_sees_none(helm: Path):
    for name in ("three values", "scheduled cronjob"):
        spec = agent_pod(render(helm, "agent", AGENTS[name]))["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]
    with_gpu = render(helm, "agent", AGENTS["gpu"])
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(agent_pod(with_gpu))  # the device plugin says which
    assert environment(find(with_gpu, "Pod"))["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_the_agent_may_dial_only_the_aggregator_the_proxy_and_names(helm: Path):
    policy = find(render(helm, "agent", AGENTS["proxy"]), "NetworkPolicy")["spec"]
    names, others = policy["egress"]
    assert {each["port"] for each in names["ports"]} == {53}
    assert [each["port"] for each in others["ports"]] == [8443, 3128]
    assert others["to"] == [{"ipBlock": {"cidr": "203.0.113.7/32"}}]
    assert [each["port"] for rule in policy["ingress"] for each in rule["ports"]] == [9090]
    closed = find(render(helm, "agent", AGENTS["proxy with a password"]), "NetworkPolicy")["spec"]
    assert not closed["ingress"]
    assert [each["port"] for each in closed["egress"][1]["ports"]] == [8443, 3128]


def test_a_password_of_the_proxy_comes_from_its_secret(helm: Path):
    (variable,) = (
        each
        for each in agent_pod(render(helm, "agent", AGENTS["proxy with a password"]))["spec"]["containers"][0]["env"]
        if each["name"] == "https_proxy"
    )
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "proxy", "key": "https_proxy"}}


def test_cert_manager_issues_the_hospital_its_identity(helm: Path):
    objects = render(helm, "agent", AGENTS["cert-manager"])
    certificate = find(objects, "Certificate")["spec"]
    assert certificate["uris"] == ["spiffe://example.org/hospital/north"]
    assert certificate["usages"] == ["digital signature", "client auth"]
    assert "dnsNames" not in certificate
    (secret,) = (each["secret"] for each in agent_pod(objects)["spec"]["volumes"] if "secret" in each)
    assert secret["secretName"] == certificate["secretName"]


# --- The aggregator -------------------------------------------------------------------------------------------


def test_roles_are_those_of_the_files(helm: Path):
    objects = render(helm, "aggregator", AGGREGATOR)
    for part in ("receiver", "operator"):
        rules = yaml.safe_load((CHARTS / "aggregator" / "roles" / f"{part}.yaml").read_text())["rules"]
        assert find(objects, "Role", f"north-{part}")["rules"] == rules
        binding = find(objects, "RoleBinding", f"north-{part}")
        assert [each["name"] for each in binding["subjects"]] == [f"north-{part}"]


def test_the_receiver_reads_no_config_map_but_the_deny_list(helm: Path):
    objects = render(helm, "aggregator", AGGREGATORS["denied"])
    (rule,) = find(objects, "Role", "north-denied")["rules"]
    assert (rule["resourceNames"], rule["verbs"]) == (["north-denied"], ["get", "list", "watch"])
    assert find(objects, "ConfigMap", "north-denied")["data"]["denied"].split() == ["south", "0" * 64]
    variables = environment(pod(objects, "north-receiver"))
    assert variables["DATAVECTOR_RECEIVER_DENY_LIST_CONFIG_MAP"] == "north-denied"


def test_every_limit_of_the_receiver_is_a_value_with_the_same_default(helm: Path):
    prefix = "DATAVECTOR_RECEIVER_LIMITS__"
    variables = environment(pod(render(helm, "aggregator", AGGREGATOR), "north-receiver"))
    limits = {name.removeprefix(prefix).lower(): value for name, value in variables.items() if name.startswith(prefix)}
    assert limits.keys() == Limits.model_fields.keys()
    assert Limits.model_validate(limits) == Limits()
    changed = environment(pod(render(helm, "aggregator", AGGREGATORS["limits"]), "north-receiver"))
    assert (changed[f"{prefix}CALLS"], changed[f"{prefix}POLL_SECONDS"]) == ("1000000", "0.5")


def test_selectors_do_not_change_with_values(helm: Path):
    for chart, sets in (("agent", AGENTS), ("aggregator", AGGREGATORS)):
        selectors = {
            str((each["metadata"]["name"], each["spec"]["selector"]))
            for values in sets.values()
            for each in render(helm, chart, values)
            if each["kind"] == "Deployment"
        }
        assert len(selectors) == {"agent": 1, "aggregator": 2}[chart]


def test_pods_of_a_volume_of_one_node_go_to_one_node(helm: Path):
    operator = pod(render(helm, "aggregator", AGGREGATOR), "north-operator")["spec"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" in operator["affinity"]["podAffinity"]
    assert "affinity" not in pod(render(helm, "aggregator", AGGREGATORS["shared storage"]), "north-operator")["spec"]


def test_cert_manager_issues_the_aggregator_names_that_hospitals_and_the_cluster_dial(helm: Path):
    certificate = find(render(helm, "aggregator", AGGREGATORS["cert-manager"]), "Certificate")["spec"]
    assert certificate["uris"] == ["spiffe://example.org/aggregator"]
    assert certificate["usages"] == ["digital signature", "server auth"]
    assert {"merge.example.org", "north-receiver.site.svc"} <= set(certificate["dnsNames"])


def test_monitoring_selects_the_metrics_and_brings_the_rules(helm: Path):
    objects = render(helm, "aggregator", AGGREGATORS["monitoring"])
    monitor, service = find(objects, "ServiceMonitor"), find(objects, "Service", "north-metrics")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in [each["name"] for each in service["spec"]["ports"]]
    for name in ("north-receiver", "north-operator"):
        assert service["spec"]["selector"].items() <= pod(objects, name)["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= find(objects, "Pod")["metadata"]["labels"].items()
    rules = yaml.safe_load((CHARTS / "aggregator" / "rules.yaml").read_text())
    assert find(objects, "PrometheusRule")["spec"] == rules
    assert all({"alert", "expr"} <= rule.keys() for group in rules["groups"] for rule in group["rules"])


def test_jobs_may_neither_be_reached_nor_reach_anybody(helm: Path):
    policy = find(render(helm, "aggregator", AGGREGATOR), "NetworkPolicy", "north-job")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy.keys() == {"podSelector", "policyTypes"}


def test_only_the_receiver_and_the_operator_have_a_token(helm: Path):
    for chart, values in (("agent", AGENT), ("aggregator", AGGREGATOR)):
        for each in render(helm, chart, values):
            if found := pod_of(each):
                named = each["metadata"]["name"] in ("north-receiver", "north-operator")
                assert found["spec"]["automountServiceAccountToken"] is named


# --- Both -----------------------------------------------------------------------------------------------------


def agent_pod(objects: list[Json]) -> Json:
    """The agent's Pod, of whatever mode."""
    (found,) = (pod_of(each) for each in objects if each["kind"] in ("Deployment", "Job", "CronJob"))
    assert found is not None
    return found


def pod(objects: list[Json], name: str) -> Json:
    """The Pod of a Deployment."""
    found = pod_of(find(objects, "Deployment", name))
    assert found is not None
    return found


def snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
