"""The files in deploy/, and what docs/deploying.md says about them."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import check_jsonschema
import httpx
import kubernetes_validate
import promql_parser
import pytest
import yaml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.container.generate import BENTO_UID_GID
from prometheus_client.parser import text_string_to_metric_families

from serving.access import Access
from serving.collection.store import FileStore

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "deploying.md").read_text()
FOLDER = ROOT / "deploy" / "kubernetes"
COMPOSE = [ROOT / "deploy" / name for name in ("compose.yaml", "compose.minio.yaml")]
PLAIN, WITH_MINIO = (yaml.safe_load(path.read_text()) for path in COMPOSE)
SERVICE = PLAIN["services"]["twinview"]
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [one for name in KUSTOMIZATION["resources"] for one in yaml.safe_load_all((FOLDER / name).read_text())]
POD = next(one for one in MANIFESTS if one["kind"] == "Deployment")["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
POD_VARIABLES = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
COMPOSE_VARIABLES = SERVICE["environment"] | WITH_MINIO["services"]["twinview"]["environment"]
BOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
RULES = [
    rule for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in RULES]
BY_PROMETHEUS = {"up": {"job", "instance"}}


@pytest.fixture
def metrics(http, picture) -> dict[str, set[str]]:
    """The samples of /metrics, each with its labels, those that Prometheus adds among them."""
    http.post("/embed", content=picture(0))
    http.app.state.metrics.drifts = lambda: [("pictures", "means", 0.1, 0.5, 500)]
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {sample.name: {*sample.labels, "job", "instance"} for family in families for sample in family.samples}
    return samples | BY_PROMETHEUS


def test_every_expression_parses_and_names_metrics_and_labels_that_exist(metrics):
    assert len(EXPRESSIONS) > 15
    for expression in EXPRESSIONS:
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))
        names = re.findall(r"(\w+)\{", expression)
        labels = set(re.findall(r'(\w+)(?:=|=~)"', expression))
        labels |= {name for grouped in re.findall(r"by \(([^)]*)\)", expression) for name in grouped.split(", ")}
        assert names and labels
        assert set(names) <= metrics.keys(), expression
        assert labels <= set.intersection(*(metrics[name] for name in names)), expression


def test_the_legends_and_summaries_name_labels_that_are_there(metrics):
    for expression, text in [
        *((target["expr"], target["legendFormat"]) for panel in BOARD["panels"] for target in panel["targets"]),
        *((rule["expr"], rule["annotations"]["summary"]) for rule in RULES),
    ]:
        named = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text))
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        left = set(grouped[0].split(", ")) if grouped else metrics[re.findall(r"(\w+)\{", expression)[0]]
        assert named <= left, (expression, text)


def test_the_document_lists_the_alerts_and_scrapes_the_job_that_they_name():
    section = DOCUMENT.partition("## Prometheus and Grafana")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [rule["alert"] for rule in RULES]
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (scrape,) = yaml.safe_load(block)["scrape_configs"]
    assert all(f'job="{scrape["job_name"]}"' in rule["expr"] for rule in RULES)
    panels = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(panels)) == len({panel["id"] for panel in BOARD["panels"]}) == len(panels) == 12


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def given(needed: str) -> str:
    """The name of the variable in `${NAME}` or `${NAME:?...}`."""
    return re.fullmatch(r"\$\{(\w+)(:\?[^}]+)?\}", needed)[1]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_the_compose_files_follow_the_compose_specification(path, capsys):
    with pytest.raises(SystemExit) as ended:
        check_jsonschema.main(["--builtin-schema", "vendor.compose-spec", str(path)])
    assert ended.value.code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: "-".join((manifest["kind"], manifest["metadata"]["name"]))
)
def test_the_manifests_follow_the_schemas_of_kubernetes(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_service_is_given_variables_that_it_reads():
    source = "".join(file.read_text() for file in (ROOT / "serving").rglob("*.py"))
    for variables in (POD_VARIABLES, COMPOSE_VARIABLES):
        assert {"TWINVIEW_ENCODER", "TWINVIEW_INDEX"} <= variables.keys()
        read = {name for name in variables if re.search(rf'"{name}"' if "TWINVIEW" in name else rf"\b{name}\b", source)}
        assert read == variables.keys()


def test_the_variables_name_folders_that_are_mounted():
    volumes = dict(volume.split(":")[1::-1] for volume in SERVICE["volumes"])  # target: source
    assert volumes[SERVICE["environment"]["TWINVIEW_INDEX"]] in PLAIN["volumes"]
    assert (COMPOSE[0].parent / volumes["/runs"]).resolve() == ROOT / "runs"
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert POD_VARIABLES["TWINVIEW_INDEX"] == mounts["index"]
    assert POD_VARIABLES["TWINVIEW_ENCODER"].startswith(mounts["models"] + "/")
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims == {one["metadata"]["name"] for one in MANIFESTS if one["kind"] == "PersistentVolumeClaim"}


@pytest.mark.slow
def test_the_image_has_the_folder_of_the_collections_for_a_volume(tmp_path):
    folders = [tmp_path / "bento", tmp_path / "bin"]
    for folder in folders:
        folder.mkdir()
    script = ["sh", ROOT / "serving" / "cli" / "container.sh"]
    subprocess.run(script, env={"BENTO_PATH": str(folders[0]), "VIRTUAL_ENV": str(tmp_path)}, check=True)
    made = Path(SERVICE["environment"]["TWINVIEW_INDEX"])
    assert made.parent == Path("/home/bentoml")  # where BentoML's images have the bento
    assert (tmp_path / made.name).is_dir()


def test_the_service_runs_as_the_user_of_the_image():
    user = BENTO_UID_GID
    assert SERVICE["user"] == f"{user}:{user}"
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["fsGroup"]) == (user, user)
    assert POD["securityContext"]["runAsNonRoot"] is True


def test_the_probes_ask_paths_that_need_no_key_at_the_port_of_the_service(serve):
    locked = serve(access=Access.from_keys("s3cr3t"))
    assert locked.get("/collections").status_code == 401
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [locked.get(probe["path"]).status_code for probe in probes] == [200, 200, 200]
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == BentoMLContainer.http.port.get() == 3000
    assert {probe["port"] for probe in probes} == {port["name"]}
    assert SERVICE["ports"] == ["3000:3000"]


@pytest.mark.slow
def test_the_health_check_succeeds_while_the_service_is_ready(listen, wait_until):
    port, _ = listen()
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").is_success, "the encoder is not loaded")
    kind, program, *arguments = SERVICE["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python") and "127.0.0.1:3000/readyz" in arguments[-1]

    def check(path: str) -> int:
        code = arguments[-1].replace("3000/readyz", f"{port}{path}")
        return subprocess.run([sys.executable, *arguments[:-1], code], capture_output=True).returncode

    assert check("/readyz") == 0
    assert check("/nothing") == 1


def test_the_memory_is_what_the_document_adds_up():
    sentence = section("Kubernetes").partition("- Memory:")[2].partition("\n- ")[0]
    parts = re.findall(r"([\d.]+) GiB( per core)?", sentence)
    cores = int(CONTAINER["resources"]["limits"]["cpu"])
    needed = sum(float(number) * (cores if per_core else 1) for number, per_core in parts)
    assert len(parts) == 5 and cores == 4
    limit = int(CONTAINER["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert needed < limit < needed + 1
    assert SERVICE["mem_limit"] == f"{limit}g"


def test_running_requests_may_finish_before_the_service_is_killed():
    source = (ROOT / "serving" / "service.py").read_text()
    stop_s = next(
        node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "STOP_S"
    )
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > stop_s
    wait_s = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["terminationGracePeriodSeconds"] > wait_s + stop_s


def test_the_kustomization_has_every_manifest_and_they_name_each_other():
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml"} == {file.name for file in FOLDER.iterdir()}
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [CONTAINER["image"]]
    kinds = {one["kind"]: one["spec"] for one in MANIFESTS}
    labels = kinds["Deployment"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["selector"]["matchLabels"] == kinds["Service"]["selector"] == labels
    assert kinds["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert kinds["PodDisruptionBudget"]["minAvailable"] < kinds["Deployment"]["replicas"]
    (port,) = kinds["Service"]["ports"]
    assert port["targetPort"] == CONTAINER["ports"][0]["name"] and port["port"] == 3000  # which Prometheus reads


@pytest.mark.slow
def test_the_collections_are_found_in_the_bucket_that_the_compose_file_makes(object_store, monkeypatch):
    variables = WITH_MINIO["services"]["twinview"]["environment"]
    store, bucket = (WITH_MINIO["services"][name] for name in ("minio", "bucket"))
    assert given(variables["AWS_ACCESS_KEY_ID"]) == given(store["environment"]["MINIO_ROOT_USER"])
    assert given(variables["AWS_SECRET_ACCESS_KEY"]) == given(store["environment"]["MINIO_ROOT_PASSWORD"])
    assert store["image"] == bucket["image"] and store["environment"] == bucket["environment"]
    assert variables["AWS_ENDPOINT_URL"] in bucket["command"][0]
    name = re.search(r"mb --ignore-existing store/(\S+)$", bucket["command"][0])[1]

    assert variables["TWINVIEW_INDEX"].startswith(f"s3://{name}/")
    for variable in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (variables | {"AWS_ENDPOINT_URL": object_store}).items():
        monkeypatch.setenv(variable, value)
    httpx.put(f"{object_store}/{name}").raise_for_status()
    files = FileStore(variables["TWINVIEW_INDEX"])
    files.write("one", b"1")
    assert files.read("one") == b"1"
    assert files.connect().list_tables().tables == []


def test_the_document_sets_what_the_compose_files_need_and_names_their_image():
    text = section("Compose")
    for path in COMPOSE:
        assert f"-f deploy/{path.name}" in text and f"(../deploy/{path.name})" in text
    needed = {name for path in COMPOSE for name in re.findall(r"(?<!\$)\$\{(\w+)", path.read_text())}
    assert set(re.findall(r"^(\w+)=", text, re.MULTILINE)) == needed
    assert f"bentoml containerize twinview:latest -t {SERVICE['image']}\n" in section("Container")
    run = section("Container").replace("\\\n", " ")
    assert f"-v twinview:{SERVICE['environment']['TWINVIEW_INDEX']} " in run
    assert f"-e TWINVIEW_INDEX={SERVICE['environment']['TWINVIEW_INDEX']} " in run


def test_the_document_makes_the_secret_and_pushes_the_image_of_the_deployment():
    text = section("Kubernetes")
    (image,) = KUSTOMIZATION["images"]
    assert f"docker push {image['newName']}:{image['newTag']}\n" in text
    name, key = re.search(r"kubectl create secret generic (\S+) --from-file=(\S+)", text).groups()
    (secret,) = (volume for volume in POD["volumes"] if "secret" in volume)
    (mount,) = (mount for mount in CONTAINER["volumeMounts"] if mount["name"] == secret["name"])
    assert secret["secret"]["secretName"] == name
    assert POD_VARIABLES["TWINVIEW_API_KEYS_FILE"] == f"{mount['mountPath']}/{key}"
    assert f"kubectl apply -k {FOLDER.relative_to(ROOT)}\n" in text
