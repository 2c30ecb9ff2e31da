import dataclasses
import hashlib
import json
import logging
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.artifact import BundleError, ModelCard, Preprocessing, encoder_id, save_bundle
from serving.inference import encoder
from serving.inference.encoder import MAX_BATCH, Buckets, NoEncoder, OnnxEncoder, find_bundle


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (MAX_BATCH, 32, 32, 3), np.uint8)


def test_the_newest_export_is_served_unless_another_is_named(make_bundle, tmp_path):
    old, new = (make_bundle(tmp_path / "runs" / name / "encoder", scale) for name, scale in (("b", 1), ("a", 2)))
    os.utime(old.folder / "model_card.json", (1, 1))
    assert find_bundle(None, tmp_path / "runs").card.id == new.card.id
    assert find_bundle(str(old.folder), tmp_path / "runs").card.id == old.card.id


def test_a_collections_encoder_is_preferred_to_a_newer_export(make_bundle, tmp_path):
    runs = tmp_path / "runs"
    old, middle, new = (make_bundle(runs / name / "encoder", scale) for name, scale in (("c", 1), ("b", 2), ("a", 3)))
    for at, made in enumerate((old, middle), 1):
        os.utime(made.folder / "model_card.json", (at, at))
    broken = make_bundle(runs / "broken" / "encoder", 4)
    os.utime(broken.folder / "model_card.json", (3, 3))
    (broken.folder / "encoder.onnx").write_text("damaged")
    for used, found in (([old.card.id], old), ([old.card.id, middle.card.id], middle), (["gone-1"], new), ([], new)):
        assert find_bundle(None, runs, used).card.id == found.card.id
    assert find_bundle(str(middle.folder), runs, [old.card.id]).card.id == middle.card.id


def test_the_model_store_is_searched_for_a_tag_and_if_there_is_no_export(bundle, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("serving.inference.encoder._in_store", lambda tag: asked.append(tag) or bundle.folder)
    assert find_bundle("cats:v2", tmp_path).card.id == bundle.card.id
    assert find_bundle(None, tmp_path).card.id == bundle.card.id
    assert asked == ["cats:v2", "twinview-encoder"]


def test_without_any_encoder_the_message_says_how_to_make_one(tmp_path, no_store):
    with pytest.raises(NoEncoder, match=rf"nothing under {tmp_path}/ .*training/pretrain.py.*export/to_onnx.py lite0"):
        find_bundle(None, tmp_path)
    with pytest.raises(NoEncoder, match=r"cats:v2 is neither"):
        find_bundle("cats:v2", tmp_path)


def test_an_exported_run_is_found_by_its_folder_or_its_name(make_bundle, tmp_path, no_store):
    runs = tmp_path / "runs"
    made = make_bundle(runs / "lite0" / "encoder", 1)
    (runs / "trained" / "checkpoints").mkdir(parents=True)
    for name in ("lite0", str(runs / "lite0"), str(made.folder)):
        assert find_bundle(name, runs).card.id == made.card.id
    with pytest.raises(
        NoEncoder, match=r"trained is not exported yet. Export it: `python export/to_onnx.py \S+trained`"
    ):
        find_bundle("trained", runs)
    for name in ("lite0", "timm:vit_tiny_patch16_224", "theirs.onnx"):
        with pytest.raises(NoEncoder, match=rf"{name} is neither .* `python export/to_onnx.py {name}`"):
            find_bundle(name, tmp_path / "empty")


def changed(bundle, folder, **facts):
    """A copy of the bundle with these changes to its card."""
    shutil.copytree(bundle.folder, folder)
    (folder / "model_card.json").write_text(json.dumps({**bundle.card.to_dict(), **facts}))
    return find_bundle(str(folder))


def test_a_graph_that_does_not_run_or_has_another_dimension_is_refused(bundle, tmp_path):
    for change, message in (({"dimension": 47}, "48"), ({"preprocessing": {"size_px": 16}}, "does not run")):
        with pytest.raises(BundleError, match=message):
            OnnxEncoder(changed(bundle, tmp_path / message, **change))


def test_a_graph_whose_output_differs_from_its_export_is_refused(bundle, tmp_path):
    within, beyond = (np.multiply(bundle.card.probe, factor).tolist() for factor in (1.0005, 1.002))
    for i, probe in enumerate((within, [])):  # an older export has none
        assert OnnxEncoder(changed(bundle, tmp_path / str(i), probe=probe)).card.id == bundle.card.id
    for i, probe in enumerate((beyond, bundle.card.probe[:-1], [float("nan")] * 16)):
        with pytest.raises(BundleError, match=r"differs by .* from its output at the export"):
            OnnxEncoder(changed(bundle, tmp_path / f"no{i}", probe=probe))


def test_a_row_of_a_batch_equals_the_row_alone(bundle, pixels):
    encode = OnnxEncoder(bundle)
    alone = np.concatenate([encode(pixels[i : i + 1]) for i in range(32)])
    np.testing.assert_allclose(encode(pixels), alone, atol=1e-6)


def names(accelerations: list[list]) -> list[list[str]]:
    return [[name if isinstance(name, str) else name[0] for name in providers] for providers in accelerations]


def test_the_fastest_provider_is_chosen_that_runtime_driver_and_libraries_support(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    trt, cuda, cpu = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
    monkeypatch.setattr("serving.inference.encoder.ort.preload_dlls", lambda: None, raising=False)
    for available, device, libraries, expected in (
        ([trt, cuda, cpu], True, True, [[trt, cuda, cpu], [cuda, cpu], [cpu]]),
        ([trt, cuda, cpu], True, False, [[cuda, cpu], [cpu]]),
        ([trt, cuda, cpu], False, True, [[cpu]]),
        ([cuda, cpu], True, True, [[cuda, cpu], [cpu]]),
        ([cpu], True, True, [[cpu]]),
    ):
        monkeypatch.setattr(
            "serving.inference.encoder.ort.get_available_providers", lambda available=available: available
        )
        monkeypatch.setattr("serving.inference.encoder._cuda_device", lambda device=device: device)
        monkeypatch.setattr("serving.inference.encoder._library", lambda name, libraries=libraries: libraries)
        assert names(encoder._accelerations()) == expected


def test_a_provider_with_wrong_output_is_logged_and_the_next_is_tried(bundle, pixels, monkeypatch, caplog):
    cpu = "CPUExecutionProvider"
    monkeypatch.setattr("serving.inference.encoder._accelerations", lambda: [[cpu], [cpu]])
    differences = iter((0.5, 0.0))
    monkeypatch.setattr(OnnxEncoder, "_difference", lambda self: next(differences))
    with caplog.at_level(logging.WARNING, "twinview"):
        assert OnnxEncoder(bundle)(pixels).shape == (32, 48)
    assert caplog.messages[0].startswith("CPUExecutionProvider does not work here, so the next provider is tried:")
    assert "differs by 5.0e-01" in caplog.messages[0]


def test_bound_buffers_equal_a_plain_run_at_every_batch_size(bundle, pixels):
    """On the CPU instead of a GPU."""
    session = onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    run = Buckets(session, 32, "cpu")
    for n in (*range(1, 33), 5, 1):
        (expected,) = session.run(["embedding"], {"pixels": pixels[:n]})
        np.testing.assert_allclose(run(pixels[:n]), expected, atol=1e-6)
    kept = run(pixels[:3])
    before = kept.copy()
    run(pixels[3:6])
    np.testing.assert_array_equal(kept, before)


def projection(folder, kind: int):
    """A bundle whose encoder projects the pixels to 8 numbers, in floats of `kind`; and the weights (3072, 8)."""
    weights = np.random.default_rng(1).normal(size=(32 * 32 * 3, 8)).astype(np.float32) / 3072
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=kind),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["projected"]),
        helper.make_node("Cast", ["projected"], ["embedding"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "projection",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor("weights", kind, weights.shape, weights.astype(helper.tensor_dtype_to_np_dtype(kind)))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), weights


def bundled(folder, model: onnx.ModelProto):
    content = model.SerializeToString()
    digest, preprocessing = hashlib.sha256(content).hexdigest(), Preprocessing(32)
    return save_bundle(
        folder, content, ModelCard(encoder_id("p", digest, preprocessing), "p", 8, preprocessing, digest)
    )


def test_graphs_in_fp16_and_int8_run_unchanged(tmp_path, pixels):
    half, weights = projection(tmp_path, TensorProto.FLOAT16)
    single, _ = projection(tmp_path, TensorProto.FLOAT)
    onnx.save(single, tmp_path / "single.onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    quantization.quantize_dynamic(tmp_path / "single.onnx", tmp_path / "int8.onnx")
    whole = onnx.load(tmp_path / "int8.onnx")
    assert any(node.op_type == "MatMulInteger" for node in whole.graph.node)

    expected = pixels.reshape(32, -1).astype(np.float64) @ weights
    for name, model, tolerance in (("half", half, 5e-3), ("whole", whole, 5e-2)):
        encode = OnnxEncoder(bundled(tmp_path / name, model))
        vectors = encode(pixels)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=tolerance * np.abs(expected).max())


def test_a_model_card_with_a_probe_survives_writing_and_reading(bundle):
    assert find_bundle(str(bundle.folder)).card == bundle.card
    assert dataclasses.asdict(bundle.card)["probe"] == bundle.card.probe
    assert len(bundle.card.probe) == 16
