"""Settings from a file, the environment and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from agent.settings import PREFIX, AgentSettings
from aggregator.settings import AggregatorSettings
from datavector.config import Section, load_settings
from datavector.errors import ConfigError


class Engine(Section):
    power: int = Field(default=1, ge=0)
    manual: Path | None = None


class Car(Section):
    name: str
    engine: Engine = Engine()
    spare: Engine | None = None
    papers: Path = Path("papers")


@pytest.fixture
def load(tmp_path: Path):
    def from_sources(text: str | None = None, environment: dict[str, str] | None = None, **flags: object) -> Car:
        file = None
        if text is not None:
            file = tmp_path / "car.toml"
            file.write_text(text)
        named = {name.replace("__", "."): value for name, value in flags.items()}
        return load_settings(Car, file, named, prefix="CAR_", environment=environment or {})

    return from_sources


def test_flags_win_over_the_environment_and_that_over_the_file(load):
    text = 'name = "file"\n[engine]\npower = 2\n'
    assert (load(text).name, load(text).engine.power) == ("file", 2)
    environment = {"CAR_NAME": "env", "CAR_ENGINE__POWER": "3", "OTHER": "x"}
    assert load(text, environment) == Car(name="env", engine=Engine(power=3))
    assert load(text, environment, name="flag", engine__power=4) == Car(name="flag", engine=Engine(power=4))


def test_a_flag_that_was_not_given_changes_nothing(load):
    assert load('name = "file"', name=None, engine__power=None).name == "file"


def test_sources_add_to_one_section(load):
    both = load('name = "a"\n[engine]\npower = 2\n', {"CAR_ENGINE__MANUAL": "m"})
    assert both.engine == Engine(power=2, manual=Path("m"))


def test_sources_add_to_a_section_that_may_be_absent(load):
    assert load('name = "a"').spare is None
    both = load('name = "a"\n[spare]\npower = 2\n', {"CAR_SPARE__MANUAL": "m"})
    assert both.spare == Engine(power=2, manual=Path("m"))


def test_paths_in_a_file_are_relative_to_the_file(load, tmp_path):
    text = 'name = "a"\npapers = "p"\n[engine]\nmanual = "m"\n[spare]\nmanual = "/abs"\n'
    car = load(text)
    assert (car.papers, car.engine.manual, car.spare.manual) == (tmp_path / "p", tmp_path / "m", Path("/abs"))
    assert load(text.replace("/abs", "s")).spare.manual == tmp_path / "s"
    assert load(text, {"CAR_PAPERS": "here"}).papers == Path("here"), "those elsewhere are as they are"


@pytest.mark.parametrize(
    ("text", "environment", "flags", "says"),
    [
        ('nmae = "a"', {}, {}, "car.toml: unknown setting 'nmae'; did you mean 'name'?"),
        ('name = "a"\n[engine]\npwr = 1', {}, {}, "unknown setting 'pwr'; did you mean 'power'?"),
        ('name = "a"\n[spare]\npwr = 1', {}, {}, "unknown setting 'pwr'; did you mean 'power'?"),
        (None, {"CAR_NAMES": "a"}, {}, "environment variable CAR_NAMES: unknown setting 'names'; did you mean 'name'?"),
        (None, {"CAR_ENGINE__POWR": "1"}, {}, "environment variable CAR_ENGINE__POWR: unknown setting 'powr'"),
        (None, {}, {"colour": "red"}, "flag --colour: unknown setting 'colour'"),
        ('name = "a"\n[engine]\npower = "x"', {}, {}, "engine.power: input should be a valid integer"),
        ('name = "a"', {"CAR_ENGINE__POWER": "-1"}, {}, "engine.power: input should be greater than or equal to 0"),
        ("", {}, {}, "name: field required"),
        ("name = 3", {}, {}, "name: input should be a valid string"),
        ('name = "a"\nengine = 3', {}, {}, "'engine' is a group of settings; name one: engine.power, engine.manual"),
        ('name = "a"', {"CAR_ENGINE": "3"}, {}, "environment variable CAR_ENGINE: 'engine' is a group of settings"),
        ("name = ", {}, {}, "car.toml cannot be read"),
    ],
)
def test_a_wrong_setting_says_where_and_what(load, text, environment, flags, says):
    with pytest.raises(ConfigError) as caught:
        load(text, environment, **flags)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for file in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"{file} cannot be read"):
            load_settings(Car, file, {}, prefix="CAR_", environment={})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Car, tmp_path / "binary.toml", {}, prefix="CAR_", environment={})


def test_what_kubernetes_says_of_services_is_no_setting(load):
    links = {
        "CAR_SERVICE_HOST": "10.0.0.1", "CAR_SERVICE_PORT": "8443", "CAR_SERVICE_PORT_GRPC": "8443",
        "CAR_PORT": "tcp://10.0.0.1:8443", "CAR_PORT_8443_TCP": "tcp://10.0.0.1:8443", "CAR_PORT_8443_TCP_ADDR": "x",
    }  # fmt: skip
    assert load('name = "a"', links).name == "a"


def test_settings_do_not_change(load):
    with pytest.raises(ValueError, match="frozen"):
        load('name = "a"').name = "b"


# --- The settings of the two sites

TLS = '[tls]\ncertificate = "c.crt"\nkey = "c.key"\nca = "ca.crt"\n'
AGENT = f'hospital = "north"\naggregator = "a:8443"\n{TLS}'


def test_an_agents_file_leads_to_its_images_and_certificates(tmp_path):
    file = tmp_path / "agent.toml"
    file.write_text(f'{AGENT}[data]\npath = "images"\n')
    environment = {f"{PREFIX}DATA__VALIDATION": "0.3", f"{PREFIX}TRAINING__EPOCHS": "2"}
    settings = load_settings(AgentSettings, file, {"training.seed": 5}, prefix=PREFIX, environment=environment)
    assert (settings.data.path, settings.data.validation) == (tmp_path / "images", 0.3)
    assert settings.tls.ca == tmp_path / "ca.crt"
    assert (settings.training.epochs, settings.training.seed) == (2, 5)


@pytest.mark.parametrize(
    "address",
    ["a:1", "merge.example.org:8443", "my_host-1:65535", "10.0.0.7:60000", "[::1]:8443", "[::ffff:10.0.0.7]:1"],
)
def test_an_aggregator_is_a_name_or_an_address_with_a_port(tmp_path, address):
    file = tmp_path / "agent.toml"
    file.write_text(AGENT.replace("a:8443", address))
    assert load_settings(AgentSettings, file, {}, prefix=PREFIX, environment={}).aggregator == address


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"north"', '"North"', "hospital must be lower-case letters"),
        ("a:8443", "https://a:8443", "aggregator must be host:port, such as merge"),
        ("a:8443", "a..b:8443", "aggregator must be host:port, such as merge"),
        ("a:8443", f"{'a' * 64}.example:8443", "aggregator must be host:port, such as merge"),
        ("a:8443", "bücher.example:8443", "aggregator must be host:port, such as merge"),
        ("a:8443", "a:65536", "aggregator must be host:port, such as merge"),
        ("[tls]", "[tsl]", "did you mean 'tls'?"),
        ("[tls]", "epochs = 3\n[tls]", "unknown setting 'epochs'; did you mean 'training.epochs'?"),
        ("ca = ", "[training]\nlearning_rate = 0.1\n#", "training.learning_rate: input should be less than or equal"),
    ],
)
def test_an_agents_file_is_checked(tmp_path, old, new, says):
    file = tmp_path / "agent.toml"
    file.write_text(AGENT.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_settings(AgentSettings, file, {}, prefix=PREFIX, environment={})
    assert says in str(caught.value)


def test_an_aggregator_has_limits_of_its_own(tmp_path):
    file = tmp_path / "aggregator.toml"
    file.write_text(f'store = "s"\npolicy = "p.yaml"\n{TLS}[limits]\nidle_timeout_seconds = 3\n')
    settings = load_settings(AggregatorSettings, file, {}, prefix="X_", environment={})
    assert (settings.store, settings.limits.idle_timeout_seconds) == (tmp_path / "s", 3)
    assert settings.tls.trust_domain == "datavector.local"


def test_without_a_file_the_environment_variables_of_settings_are_named(load):
    with pytest.raises(
        ConfigError, match=r"name \(CAR_NAME\): field required; engine\.power \(CAR_ENGINE__POWER\): input"
    ):
        load(None, {"CAR_ENGINE__POWER": "-1"})
    with pytest.raises(ConfigError, match=r"wrong: name: field required; set them in the configuration file"):
        load("")
