"""Policy files, and the shape of the objects."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from aggregator.policy_file import load_policies
from aggregator.resources import CalibrationMode, CalibrationReport, DataVector, MergePolicy, ModelVersion, Phase
from datavector.errors import ConfigError
from tests.aggregator.objects import START, at, policy, vector, version

HEAD = "apiVersion: datavector.dev/v1alpha1\nkind: MergePolicy\nmetadata: {name: brain}\n"
MINIMAL = HEAD + "spec: {baseModelRef: lite0}\n"


def read(tmp_path: Path, text: str | bytes) -> tuple[MergePolicy, ...]:
    path = tmp_path / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_policies(path)


def test_a_policy_needs_only_a_base_model(tmp_path):
    (read_policy,) = read(tmp_path, MINIMAL)
    spec = read_policy.spec
    assert (read_policy.name, spec.base_model_ref, spec.method.name) == ("brain", "lite0", "sum")
    assert (spec.trigger.min_hospitals, spec.calibration.mode) == (2, CalibrationMode.VISIT)


def test_the_example_of_the_documentation_is_a_policy(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    (example,) = read(tmp_path, text.split("```yaml\n")[1].split("```")[0])
    assert example.spec.trigger.quiet_period_seconds == 600
    assert list(example.spec.method.bodies) == ["iso-c-scale1.25", "sum", "mean"]
    assert example.spec.evaluation.quorum == 3


def test_a_file_may_hold_several_policies(tmp_path):
    other = MINIMAL.replace("brain", "lung")
    assert [each.name for each in read(tmp_path, f"---\n{MINIMAL}---\n{other}---\n")] == ["brain", "lung"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{baseModelRef: b, historyLimits: 3}", "spec.historyLimits is no field here; did you mean historyLimit?"),
        ("{baseModelRef: b, method: {nam: sum}}", "spec.method.nam is no field here; did you mean name?"),
        (
            "{baseModelRef: b, trigger: {minHospital: 3}}",
            "spec.trigger.minHospital is no field here; did you mean minHospitals?",
        ),
        (
            "{baseModelRef: b, trigger: {min_hospitals: 3}}",
            "spec.trigger.min_hospitals is no field here; did you mean minHospitals?",
        ),
        (
            "{baseModelRef: b, minHospitals: 3}",
            "spec.minHospitals is no field here; did you mean spec.trigger.minHospitals?",
        ),
        (
            "{baseModelRef: b, trigger: {quietPeriodSeconds: 5, maxWaitSeconds: 4}}",
            "spec.trigger: maxWaitSeconds is shorter than quietPeriodSeconds",
        ),
        ("{baseModelRef: b, trigger: {minHospitals: 0}}", "spec.trigger.minHospitals: input should be greater"),
        ("{baseModelRef: b, trigger: {quietPeriodSeconds: 1e20}}", "spec.trigger.quietPeriodSeconds: input should be"),
        ("{baseModelRef: b, trigger: {quietPeriodSeconds: .nan}}", "finite"),
        ("{baseModelRef: b, method: {parameters: {scale: .inf}}}", "spec.method.parameters.scale: input should be a f"),
        ("{baseModelRef: b, calibration: {mode: visits}}", "'visit', 'meeting', 'uploaded' or 'none'"),
        ("{baseModelRef: b, calibration: {quorum: none}}", "spec.calibration.quorum: input should be a valid integer"),
        ("{baseModelRef: b, trigger: 3}", "spec.trigger: input should be a valid dictionary"),
        ("{}", "spec.baseModelRef: field required"),
        ("[1]", "spec: input should be a valid dictionary"),
    ],
)
def test_a_wrong_policy_says_where_and_what(tmp_path, spec, says):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"{HEAD}spec: {spec}\n")
    assert says in caught.value.message
    assert str(tmp_path / "policy.yaml") in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "kind: Deployment",
        "just text",
        "- 1",
        MINIMAL.replace("v1alpha1", "v2"),
        MINIMAL.replace("name: brain", "name: Brain"),
        MINIMAL.replace("brain", "b" * 53),
        MINIMAL + "state: {}",
        MINIMAL + "1: 2",
        "a: [",
        "a: !!python/object:os.system {}",
        b"\xff\xfe\x00",
        "",
        f"{MINIMAL}---\n{MINIMAL}",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_anything_but_differently_named_policies_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        load_policies(tmp_path / "absent.yaml")


# --- Objects


@pytest.mark.parametrize(
    "each",
    [
        policy("p", mode="visit", quorum=2),
        vector("north", withdrawn=True),
        version(
            policy(),
            vector("north"),
            vector("south"),
            phase=Phase.READY,
            calibration=CalibrationReport(mode="visit", hospitals=(), images=3),
        ),
    ],
    ids=lambda each: each.kind_name,
)
def test_an_object_is_the_same_after_json(each):
    dumped = each.dump()
    assert dumped["kind"] == each.kind_name
    assert type(each).parse(json.loads(json.dumps(dumped))) == each


def test_fields_are_in_camel_case_outside():
    assert set(vector("north").dump()["spec"]) == {
        "hospital", "baseModelRef", "sequence", "artifact", "sampleCount", "consent", "released",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("spec", "hospital", "../etc"),
        ("spec", "hospital", "North"),
        ("spec", "sequence", 0),
        ("spec", "baseModelRef", "sha256:short"),
        ("spec", "consent", "Maybe"),
        ("metadata", "name", "a/b"),
        ("metadata", "name", "a\n"),
    ],
)
def test_a_vector_that_makes_no_sense_is_no_object(part, field, value):
    content = vector("north").dump()
    content[part][field] = value
    with pytest.raises(ValueError, match="validation error"):
        DataVector.parse(content)


def test_objects_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        vector("north").spec.sequence = 2


def ready_condition(of: ModelVersion):
    return next(each for each in of.status.conditions if each.type == "Ready")


def test_a_condition_keeps_the_time_at_which_it_last_changed():
    pending = version(policy(), vector("north"), vector("south"))
    calibrating = pending.with_phase(Phase.CALIBRATING, now=at(10))
    ready = calibrating.with_phase(Phase.READY, now=at(20))
    assert [ready_condition(each).last_transition_time - START for each in (pending, calibrating, ready)] == [
        timedelta(), timedelta(), timedelta(seconds=20),
    ]  # fmt: skip


def test_a_version_that_is_taken_up_again_is_not_merged_yet():
    again = version(policy(), vector("north"), vector("south"), phase=Phase.READY).with_phase(Phase.PENDING, now=at(5))
    assert {each.type: each.status for each in again.status.conditions} == dict.fromkeys(
        ("Merged", "Calibrated", "Exported", "Ready"), "False"
    )


def test_a_new_phase_starts_its_attempts_afresh():
    tried = version(policy(), vector("north"), vector("south"), attempts=3, retry_at=at(9), message="disk full")
    status = tried.with_phase(Phase.RELEASING, now=at(5)).status
    assert (status.attempts, status.retry_at, status.message) == (0, None, "")
