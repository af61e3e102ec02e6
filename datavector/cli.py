"""The command line. Every command imports what it needs when it runs, so that `--help` and `predict` stay light."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from datavector.errors import DataError, DataVectorError, Interrupted, ReleaseError, UsageError

app = typer.Typer(
    name="datavector",
    help="Merge hospitals' fine-tuned classifiers without their images, without rounds, without waiting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
base_app = typer.Typer(help="The pretrained model that every hospital starts from.", no_args_is_help=True)
certs_app = typer.Typer(help="A test authority and its certificates; production brings its own.", no_args_is_help=True)
release_app = typer.Typer(help="Merged models, ready to use.", no_args_is_help=True)
agent_app = typer.Typer(help="A hospital: fine-tunes, sends its data vector, serves tasks.")
app.add_typer(base_app, name="base")
app.add_typer(certs_app, name="certs")
app.add_typer(release_app, name="release")
app.add_typer(agent_app, name="agent")

Config = Annotated[Path | None, typer.Option("--config", help="TOML file; flags and the environment override it.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
Release = Annotated[Path, typer.Argument(help="A release folder.")]


_WRONG_PATH = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}

INTERRUPTED = 130  # how typer ends on Ctrl-C


def main() -> None:
    """Entry point: an error for a person is printed as one, with what to do next."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does: a file's name need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ", stream=sys.stdout)
    logging.Formatter.converter = time.gmtime
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach a person as ours
    try:
        app()
    except Interrupted as stopped:
        print(f"{stopped.message}; {stopped.remedy}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except DataVectorError as error:
        print(f"error: {error.message}\n       {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _WRONG_PATH or error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}\n       check the path, and who may write there",
            file=sys.stderr,
        )
        sys.exit(1)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(1)


# --- Base models and certificates -----------------------------------------------------------------------------


@base_app.command("create")
def base_create(
    architecture: Annotated[str, typer.Option(help="A torchvision classifier, or efficientnet_lite0.")],
    classes: Annotated[Path, typer.Option(help="Text file with one class a line, in the order of the outputs.")],
    output: Output,
    weights: Annotated[Path | None, typer.Option(help="Pretrained state dict (.pth, .pt, .safetensors).")] = None,
    name: Annotated[str | None, typer.Option(help="What policies call it; the architecture by default.")] = None,
    size: Annotated[int | None, typer.Option(help="Input height and width in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new classification head.")] = 0,
) -> None:
    """Make the base model artifact that an aggregator hands to every hospital."""
    from datavector.networks import create_base

    try:
        labels = tuple(line.strip() for line in classes.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{classes} cannot be read ({error})", remedy="give a text file with one class a line"
        ) from error
    base = create_base(
        output, architecture=architecture, classes=labels, weights=weights, name=name, size=size, seed=seed
    )
    mebibytes = base.layout.size / 2**20
    typer.echo(
        f"{output}: {base.name}, {len(base.classes)} classes, {base.layout.elements:,} values, {mebibytes:.1f} MiB"
    )
    typer.echo(base.digest)


@base_app.command("import")
def base_import(
    source: Annotated[Path, typer.Argument(help="Folder that `datavector base create` wrote.")],
    store: Annotated[Path, typer.Option(help="The aggregator's store.")],
) -> None:
    """Copy a base model into an aggregator's store; prints the BaseModel object to apply in a cluster."""
    from aggregator.importing import import_base

    typer.echo(import_base(source, store), nl=False)


ServerNames = Annotated[
    list[str] | None, typer.Option("--server-name", help="DNS name or IP address of the aggregator; may be repeated.")
]


@certs_app.command("init")
def certs_init(
    output: Output = Path("certs"),
    trust_domain: Annotated[str, typer.Option(help="First part of every identity.")] = "datavector.local",
    server_name: ServerNames = None,
) -> None:
    """Make a test authority and the aggregator's certificate."""
    from datavector.wire.certs import demand_server_names, init_authority, issue_aggregator

    names = _server_names(server_name)
    demand_server_names(names)  # before anything is written: an authority is made only once
    init_authority(output, trust_domain=trust_domain)
    certificate = issue_aggregator(output, server_names=names)
    typer.echo(f"{output / 'ca.crt'}: authority of {trust_domain}\n{certificate}: the aggregator's certificate")


@certs_app.command("issue")
def certs_issue(
    hospital: Annotated[str | None, typer.Option(help="Name of the hospital.")] = None,
    aggregator: Annotated[bool, typer.Option("--aggregator", help="Renew the aggregator's certificate.")] = False,
    server_name: ServerNames = None,
    output: Annotated[Path, typer.Option("--authority", help="Folder that `certs init` wrote.")] = Path("certs"),
    days: Annotated[int, typer.Option(min=1, help="Days that the certificate is valid.")] = 365,
) -> None:
    """Make a hospital's certificate and key, or the aggregator's anew."""
    from datavector.wire.certs import issue_aggregator, issue_hospital, server_names

    if aggregator == (hospital is not None):
        raise UsageError("a certificate is for a hospital or the aggregator", remedy="give --hospital or --aggregator")
    if hospital is not None and server_name:
        raise UsageError("a hospital's certificate has no server name", remedy="leave --server-name out")
    if hospital is not None:
        certificate, bearer = issue_hospital(output, hospital, days=days), hospital
    else:
        names = _server_names(server_name) if server_name else server_names(output / "aggregator.crt")
        certificate = issue_aggregator(output, server_names=names, days=days)
        bearer = f"the aggregator ({', '.join(names)})"
    typer.echo(f"{certificate}: speaks for {bearer}, valid for {days} days")


@certs_app.command("secret")
def certs_secret(
    hospital: Annotated[str | None, typer.Option(help="Name of the hospital.")] = None,
    aggregator: Annotated[bool, typer.Option("--aggregator", help="The aggregator's certificate.")] = False,
    authority: Annotated[Path, typer.Option("--authority", help="Folder that `certs init` wrote.")] = Path("certs"),
    name: Annotated[str | None, typer.Option(help="Of the Secret; HOSPITAL-tls or aggregator-tls by default.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Of the Secret; kubectl's own by default.")] = None,
) -> None:
    """Print a certificate with its private key as a Kubernetes Secret, for `kubectl apply -f -`."""
    from datavector.wire.secret import tls_secret

    if aggregator == (hospital is not None):
        raise UsageError("a certificate is for a hospital or the aggregator", remedy="give --hospital or --aggregator")
    typer.echo(tls_secret(authority, hospital, name=name, namespace=namespace), nl=False)


def _server_names(given: list[str] | None) -> list[str]:
    return ["localhost", "127.0.0.1", *(given or [])]


# --- Hospital -------------------------------------------------------------------------------------------------

Hospital = Annotated[
    str | None, typer.Option("--hospital", help="Name of this hospital; the certificate's where absent.")
]
Aggregator = Annotated[str | None, typer.Option("--aggregator", help="host:port of the aggregator.")]
State = Annotated[Path | None, typer.Option("--state", help="Folder that survives restarts.")]
Certificate = Annotated[Path | None, typer.Option("--certificate", help="The hospital's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="Its private key.")]
Authority = Annotated[Path | None, typer.Option("--ca", help="The authority's certificate.")]
Policy = Annotated[str | None, typer.Option("--policy", help="Policy of the aggregator, where it has several.")]


@agent_app.callback(invoke_without_command=True)
def agent(
    context: typer.Context,
    config: Config = None,
    hospital: Hospital = None,
    aggregator: Aggregator = None,
    state: State = None,
    certificate: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    policy: Policy = None,
    data: Annotated[Path | None, typer.Option(help="Image folder or CSV manifest.")] = None,
    base: Annotated[str | None, typer.Option(help="Digest of the base model, to pin it.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and augmentation.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of Prometheus metrics; 0 for none.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Leave after the upload.")] = False,
    tasks_only: Annotated[bool, typer.Option("--tasks-only", help="Serve what is waiting, then leave.")] = False,
    preflight_only: Annotated[bool, typer.Option("--preflight", help="Check everything, start nothing.")] = False,
) -> None:
    """Fine-tune on this hospital's images, send the data vector, then serve tasks until stopped."""
    if context.invoked_subcommand is not None:
        if any(value not in (None, False) for value in context.params.values()):
            command = context.invoked_subcommand
            raise UsageError(f"options before `{command}` are not for it", remedy=f"give them after `{command}`")
        return
    if once + tasks_only + preflight_only > 1:
        raise UsageError("--once, --tasks-only and --preflight exclude each other", remedy="give one of them")
    from agent.main import check, run, serve_waiting_tasks

    flags = _peer_flags(hospital, aggregator, state, certificate, key, ca, policy)
    flags |= {"data.path": data, "base": base, "training.epochs": epochs, "training.seed": seed}
    settings = _agent_settings(config, flags | {"metrics_port": metrics_port})
    if preflight_only:
        check(settings)
    elif tasks_only:
        serve_waiting_tasks(settings)
    else:
        run(settings, once=once)


@agent_app.command("ledger")
def agent_ledger(
    config: Config = None,
    state: State = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, as stored.")] = False,
) -> None:
    """Print everything that left this building."""
    from agent.site import print_ledger

    print_ledger(state or _agent_settings(config, {}).state, as_json=as_json)


@app.command()
def withdraw(
    config: Config = None,
    hospital: Hospital = None,
    aggregator: Aggregator = None,
    state: State = None,
    certificate: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    base: Annotated[str, typer.Option(help="Only vectors of this base model (digest); all where absent.")] = "",
    reason: Annotated[str, typer.Option(help="A sentence for the aggregation site.")] = "",
) -> None:
    """Take this hospital's vectors back, for ever. Models that contain them are revoked at once."""
    from agent.site import withdraw as take_back

    settings = _agent_settings(config, _peer_flags(hospital, aggregator, state, certificate, key, ca, None))
    take_back(settings, base_digest=base, reason=reason)


@app.command()
def rejoin(
    config: Config = None,
    state: State = None,
    base: Annotated[str, typer.Option(help="Only for this base model (digest); for all where absent.")] = "",
) -> None:
    """Take part again after a withdrawal. Nothing is sent; what was withdrawn stays withdrawn."""
    from agent.site import rejoin as take_part_again

    take_part_again(state or _agent_settings(config, {}).state, base_digest=base)


@release_app.command("fetch")
def release_fetch(
    output: Output,
    config: Config = None,
    hospital: Hospital = None,
    aggregator: Aggregator = None,
    state: State = None,
    certificate: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    policy: Policy = None,
) -> None:
    """Download the newest Ready model, and verify it."""
    from agent.site import fetch_release

    settings = _agent_settings(config, _peer_flags(hospital, aggregator, state, certificate, key, ca, policy))
    fetch_release(settings, output, verify=release_verify)


def _peer_flags(
    hospital: str | None,
    aggregator: str | None,
    state: Path | None,
    certificate: Path | None,
    key: Path | None,
    ca: Path | None,
    policy: str | None,
) -> dict[str, Any]:
    tls = {"tls.certificate": certificate, "tls.key": key, "tls.ca": ca}
    return {"hospital": hospital, "aggregator": aggregator, "state": state, "policy": policy, **tls}


def _agent_settings(config: Path | None, flags: dict[str, Any]) -> Any:
    from agent.settings import PREFIX, AgentSettings
    from datavector.config import load_settings

    return load_settings(AgentSettings, config, flags, prefix=PREFIX)


# --- Merging files ---------------------------------------------------------------------------------------------


@app.command("merge")
def merge_models(
    models: Annotated[list[Path] | None, typer.Argument(help="Fine-tuned checkpoints, or data vectors.")] = None,
    base: Annotated[Path | None, typer.Option(help="What they were fine-tuned from: a file or a base model.")] = None,
    method: Annotated[str, typer.Option(help="How to merge; --methods lists them.")] = "sum",
    param: Annotated[list[str] | None, typer.Option(help="name=number, a parameter of the method.")] = None,
    samples: Annotated[list[int] | None, typer.Option(min=1, help="Training images of each model, in order.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Only show how the vectors lie to each other.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --compare: image file to draw that into.")] = None,
    list_methods: Annotated[bool, typer.Option("--methods", help="List the methods and their parameters.")] = False,
) -> None:
    """Merge models that were fine-tuned from one base, without any hospital."""
    from datavector.merging import merge_command, show_methods

    if list_methods:
        show_methods()
        return
    if base is None or not models:
        raise UsageError("--base and at least one model are needed", remedy="see: datavector merge --help")
    if compare:
        from datavector.checkpoints import compare_files
        from datavector.similarity import show_similarity

        show_similarity([path.name for path in models], compare_files(base, models), picture)
        return
    if output is None:
        raise UsageError("there is no file to write", remedy="give -o FILE, or --compare")
    merge_command(base, models, method, param or [], output, samples or [])


# --- Aggregation site -----------------------------------------------------------------------------------------

Listen = Annotated[str | None, typer.Option(help="address:port; port 0 takes a free one.")]
ServerCertificate = Annotated[Path | None, typer.Option(help="The aggregator's certificate.")]
ServerKey = Annotated[Path | None, typer.Option(help="Its private key.")]
CertificateAuthority = Annotated[
    Path | None, typer.Option(help="The authority that signed the hospitals' certificates.")
]
TrustDomain = Annotated[str | None, typer.Option(help="First part of every identity.")]
MetricsPort = Annotated[int | None, typer.Option(help="Port of Prometheus metrics; 0 for none.")]


@app.command("release-quarantine")
def release_quarantine(
    vector: Annotated[str, typer.Argument(help="Name of the vector, as `datavector status` shows it.")],
    store: Annotated[Path, typer.Option(help="Folder of the embedded aggregator.")],
) -> None:
    """Let a vector be merged that is out of line with the others; without a cluster."""
    from aggregator.quarantine import release_quarantine as release

    typer.echo(release(store, vector))


@app.command()
def aggregator(
    config: Config = None,
    store: Annotated[Path | None, typer.Option(help="Folder of everything that must survive.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file with MergePolicy documents.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base model artifact to import.")] = None,
    listen: Listen = None,
    certificate: ServerCertificate = None,
    key: ServerKey = None,
    ca: CertificateAuthority = None,
    trust_domain: TrustDomain = None,
    metrics_port: MetricsPort = None,
) -> None:
    """Take vectors in, merge them as the policy says, and release the result. Needs no cluster."""
    from aggregator.main import run
    from aggregator.settings import PREFIX, AggregatorSettings
    from datavector.config import load_settings

    flags = _server_flags(store, listen, metrics_port, certificate, key, ca, trust_domain)
    flags |= {"policy": policy, "base": base}
    run(load_settings(AggregatorSettings, config, flags, prefix=PREFIX))


@app.command()
def receiver(
    config: Config = None,
    store: Annotated[Path | None, typer.Option(help="Folder that it shares with the operator and its Jobs.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Of the objects; the Pod's own where absent.")] = None,
    listen: Listen = None,
    certificate: ServerCertificate = None,
    key: ServerKey = None,
    ca: CertificateAuthority = None,
    trust_domain: TrustDomain = None,
    metrics_port: MetricsPort = None,
) -> None:
    """In a Kubernetes cluster: talk to hospitals, and keep what they send as custom resources."""
    from aggregator.cluster_receiver import run
    from aggregator.settings import RECEIVER_PREFIX, ClusterReceiverSettings
    from datavector.config import load_settings

    flags = _server_flags(store, listen, metrics_port, certificate, key, ca, trust_domain)
    run(load_settings(ClusterReceiverSettings, config, flags | {"namespace": namespace}, prefix=RECEIVER_PREFIX))


def _server_flags(
    store: Path | None,
    listen: str | None,
    metrics_port: int | None,
    certificate: Path | None,
    key: Path | None,
    ca: Path | None,
    trust_domain: str | None,
) -> dict[str, Any]:
    tls = {"tls.certificate": certificate, "tls.key": key, "tls.ca": ca, "tls.trust_domain": trust_domain}
    return {"store": store, "listen": listen, "metrics_port": metrics_port, **tls}


@app.command()
def status(store: Annotated[Path, typer.Option(help="The aggregator's store.")]) -> None:
    """What an embedded aggregator has, and what each policy waits for."""
    from aggregator.main import print_status

    print_status(store)


# --- Releases -------------------------------------------------------------------------------------------------


@app.command("verify")
def release_verify(release: Release) -> None:
    """Check a release: checksums, metadata, and ONNX Runtime against the stored torch results."""
    from datavector.release import verify_release

    report = verify_release(release)
    for check in report.checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12} {check.detail}")
    if not report.ok:
        raise ReleaseError(f"{release} does not verify", remedy="fetch or make the release again")


@app.command()
def predict(release: Release, images: Annotated[list[Path], typer.Argument(help="Image files.")]) -> None:
    """Classify images with a release: one JSON object a line."""
    from datavector.release.predict import predict as classify

    failed = 0
    for result in classify(release, images):
        failed += "error" in result
        typer.echo(json.dumps(result, ensure_ascii=False))
    if failed:
        raise DataError(f"{failed} of {len(images)} images could not be read", remedy="see the lines above")


# --- Demo -----------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Output = Path("demo-out"),
    data: Annotated[Path | None, typer.Option(help="ImageFolder with a manifest.csv; synthesised if absent.")] = None,
    split_column: Annotated[str, typer.Option(help="Column of the manifest that names the hospital.")] = "hospital",
    hospitals: Annotated[int, typer.Option(min=2, max=26, help="How many hospitals take part.")] = 4,
    images: Annotated[int, typer.Option(min=8, help="Most training images per hospital.")] = 120,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each hospital; the agent's default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    method: Annotated[str, typer.Option(help="Merge method of the policy; auto tries several.")] = "auto",
    with_controls: Annotated[
        bool, typer.Option("--with-controls", help="Also pooled, random, no restoration.")
    ] = False,
) -> None:
    """From images to one merged ONNX model: real processes, real certificates, on this machine alone."""
    from agent.settings import Training
    from datavector.demo.story import DemoOptions, run_demo

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which also ends its processes
    run_demo(
        DemoOptions(
            output=output,
            data=data,
            split_column=split_column,
            hospitals=hospitals,
            images=images,
            epochs=epochs or Training().epochs,
            seed=seed,
            method=method,
            with_controls=with_controls,
        )
    )


if __name__ == "__main__":
    main()
