"""The evaluator under published protocols: class-conditional and text teachers, several workers, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raydistill.data.coco import read_coco
from raydistill.data.prepare import prepare_coco
from raydistill.data.scenes import write_scenes
from raydistill.errors import ConfigError, DataError, RayDistillError
from raydistill.eval.inception import Inception
from raydistill.eval.judge import Part
from raydistill.eval.protocol import to_uint8
from raydistill.eval.published import published
from raydistill.methods.dmd2 import DMD2, DMD2Config
from raydistill.models.denoiser import state_for_saving
from raydistill.models.diffusers_hub import import_transformers, load_pipeline
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.edm_pipeline import EDMPipeline
from raydistill.roles.evaluation_inputs import References, require_conditions, require_files
from raydistill.roles.evaluator import Evaluator, EvaluatorConfig
from raydistill.runtime.settings import BUILTIN_TEACHERS
from tests.eval.detector_file import write_detector

SAMPLES = 24


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file, sha256 = write_detector(tmp_path_factory.mktemp("detector"))
    return {"detector_file": str(file), "detector_sha256": sha256}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of 32 x 32 pixels."""
    folder, draws = tmp_path_factory.mktemp("reference"), np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            folder / f"{number:02d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as COCO's val2014."""
    root = write_scenes(tmp_path_factory.mktemp("data") / "coco", num_train=1, num_val=8, progress=False)
    (root / "val").rename(root / "val2014")
    (root / "annotations" / "captions_val.json").rename(root / "annotations" / "captions_val2014.json")
    return root


def cifar(timesteps: tuple[float, ...] = (80.0,), **settings: Any) -> Evaluator:
    config = EDMNetConfig(
        family="ddpmpp", image_size=32, channels=3, label_dim=10, base_channels=4, channel_mult=(1, 1),
        blocks_per_level=1, attention_sizes=(),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = EDMPipeline(EDMDenoiser(config))
    for weights in pipeline.denoiser.parameters():
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(weights.numel())
            weights.add_(0.1 * torch.randn_like(weights))  # networks begin with zeros at their end
    pipeline.denoiser.requires_grad_(False)
    method = DMD2(
        DMD2Config(timesteps=timesteps, gan_weight_generator=0.0, gan_weight_critic=0.0),
        pipeline.denoiser.schedule,
        guidance_scale=1.0,
    )
    defaults = {"protocol": f"edm-cifar10-50k@{SAMPLES}", "batch_size": 4, "teacher_steps": 2}
    return Evaluator(EvaluatorConfig(**defaults | settings), pipeline, method, 1.0)


def own_weights(judge: Evaluator) -> dict[str, Tensor]:
    return state_for_saving(judge.pipeline.denoiser)


class Shares:
    """Helpers in this process."""

    def __init__(self, judges: list[Evaluator], lost: int | None = None):
        self.count = len(judges)
        self._judges, self._lost, self.started = judges, lost, 0

    def start(self) -> None:
        self.started += 1

    def collect(self) -> list[Part | None]:
        workers = self.count + 1
        return [
            None if worker == self._lost else judge.part(None, worker, workers)
            for worker, judge in enumerate(self._judges, 1)
        ]


def test_edms_protocol_end_to_end(detector: dict[str, str], images: Path) -> None:
    judge = cifar((80.0, 2.0), **detector, reference=str(images))
    metrics = judge.figures(own_weights(judge))
    metrics.pop("eval/seconds")
    assert set(metrics) == {f"eval/{name}_24" for name in ("fid", "kid", "precision", "recall")}
    assert all(type(value) is float for value in metrics.values())
    assert {"eval/" + name.removeprefix("eval/") for name in metrics} == set(judge.config.figures.values())
    protocol = judge.protocol
    assert (protocol.name, protocol.num_samples, protocol.num_reference) == (
        "edm-cifar10-50k@24",
        SAMPLES,
        30,
    )
    assert (protocol.resize, protocol.uint8_rule, protocol.seed_rule) == (
        "inside",
        "round",
        "generator-per-image on cpu",
    )
    assert protocol.detector_sha256 == detector["detector_sha256"]

    # the same by hand, from EDM's rule
    noise, labels, again = [], [], []
    for index in range(SAMPLES):
        generator = torch.Generator().manual_seed(index)
        noise.append(torch.randn(3, 32, 32, generator=generator))
        labels.append(str(int(torch.randint(10, size=[], generator=generator))))
        again.append(torch.randn(3, 32, 32, generator=generator))
    assert judge.samples.captions == labels
    net = judge.pipeline.denoiser
    cond = judge.pipeline.encode_text(labels)
    one = torch.ones(SAMPLES)
    with torch.no_grad():
        x0 = net(80 * torch.stack(noise), 80 * one, cond)
        x0 = net(x0 + 2 * torch.stack(again), 2 * one, cond)
    inception = Inception(*detector.values())
    drawn = inception(to_uint8(x0)).double().numpy()
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(images.iterdir())])
    real = inception(torch.from_numpy(pixels).movedim(-1, 1)).double().numpy()
    x, y = drawn - drawn.mean(0), real - real.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    mean = np.square(drawn.mean(0) - real.mean(0)).sum()
    expected = mean + np.square(x).sum() / (len(x) - 1) + np.square(y).sum() / (len(y) - 1) - 2 * cross
    assert metrics["eval/fid_24"] == pytest.approx(expected, rel=1e-4)


def test_one_and_three_workers_find_the_same_figures_also_when_one_is_lost(
    detector: dict[str, str], images: Path, tmp_path: Path
) -> None:
    judges = [cifar(**detector, reference=str(images)) for _ in range(3)]
    alone = judges[0].evaluate_teacher()
    shares = Shares(judges[1:], lost=2)
    found = judges[0].evaluate_teacher(shares)
    assert shares.started == 1
    assert found.protocol == alone.protocol
    assert found.metrics.keys() == alone.metrics.keys()
    for name, value in alone.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-6), name
    # helpers never read the reference
    parts = [judges[1].part(None, worker, 3) for worker in range(3)]
    assert [part.statistics["fid"].count for part in parts] == [8, 8, 8]
    assert "sha256" not in vars(judges[1]._setup)


def test_statistics_from_a_file_give_fid_alone(
    detector: dict[str, str], images: Path, tmp_path: Path
) -> None:
    inception = Inception(*detector.values())
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(images.iterdir())])
    real = inception(torch.from_numpy(pixels).movedim(-1, 1)).double().numpy()
    np.savez(tmp_path / "cifar10-32x32.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    from_file = cifar(**detector, reference=str(tmp_path / "cifar10-32x32.npz"))
    from_images = cifar(**detector, reference=str(images))
    found, expected = (each.evaluate_teacher() for each in (from_file, from_images))
    assert set(found.metrics) == {"eval/teacher_fid_24"}
    assert set(from_file.config.figures.values()) == {"eval/fid_24"}
    assert found.metrics["eval/teacher_fid_24"] == pytest.approx(
        expected.metrics["eval/teacher_fid_24"], rel=1e-5
    )
    assert from_file.protocol.num_reference == 50_000
    assert found.protocol["reference_sha256"] != expected.protocol["reference_sha256"]


def write_clip(folder: Path) -> Path:
    """A tiny CLIPModel with its processor, as transformers writes it."""
    transformers = import_transformers()
    folder.mkdir()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,")
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**small, **ends, "vocab_size": len(words), "max_position_embeddings": 77}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    prepare = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(image_processor=prepare, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_sdxls_protocol_has_patches_and_a_clip_score(
    detector: dict[str, str], coco: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(str(BUILTIN_TEACHERS["builtin:scenes"]))
    method = DMD2(DMD2Config(), pipeline.denoiser.schedule, guidance_scale=1.5)
    clip = write_clip(tmp_path / "clip")
    config = EvaluatorConfig(
        protocol="dmd2-sdxl-coco10k@6", coco=str(coco), clip=str(clip), grid_images=2, batch_size=4, teacher_steps=1,
        **detector,
    )  # fmt: skip
    judge = Evaluator(config, pipeline, method, 1.5)
    metrics = judge.figures(own_weights(judge))
    metrics.pop("eval/seconds")
    kinds = ("fid", "patch_fid", "kid", "precision", "recall", "clip_score")
    assert set(metrics) == {f"eval/{kind}_6" for kind in kinds} == set(config.figures.values())
    protocol = judge.protocol
    assert protocol.resize == "crop-lanczos512-clean299"
    assert protocol.patch_resize == "patch299-clean299"
    assert protocol.uint8_rule == "floor"
    assert protocol.num_reference == 8, "all images of the folder, not only those of the captions"
    assert judge.samples.captions == [image.captions[0] for image in read_coco(coco, "val2014")][:6]

    # the score by hand: transformers' own, on the generator's bytes
    transformers = import_transformers()
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    pictures = judge.samples.generated(list(range(6))).movedim(1, -1).numpy()
    cosines = []
    with torch.no_grad():
        for picture, caption in zip(pictures, judge.samples.captions, strict=True):
            image = Image.fromarray(picture).resize((256, 256), Image.LANCZOS)
            inputs = processor(text=[f"A photo depicts {caption}"], images=image, return_tensors="pt")
            cosines.append(model(**inputs).logits_per_image.item() / model.logit_scale.exp().item())
    assert metrics["eval/clip_score_6"] == pytest.approx(float(np.mean(cosines)), abs=1e-5)


def test_captions_may_come_from_a_file_and_the_reference_from_shards(
    detector: dict[str, str], coco: Path, tmp_path: Path
) -> None:
    prepare_coco(coco, "val2014", str(tmp_path / "shards"), samples_per_shard=3)
    lines = [image.captions[0] for image in read_coco(coco, "val2014")]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    pipeline = load_pipeline(str(BUILTIN_TEACHERS["builtin:scenes"]))
    method = DMD2(DMD2Config(), pipeline.denoiser.schedule, guidance_scale=1.0)
    config = EvaluatorConfig(
        protocol="gigagan-coco30k@5", captions=str(tmp_path / "captions.txt"), reference=str(tmp_path / "shards"),
        grid_images=2, teacher_steps=1, **detector,
    )  # fmt: skip
    assert not config.reads_coco
    require_files(config)
    shards = Evaluator(config, pipeline, method, 1.0)
    folder = Evaluator(replace(config, captions=None, reference=None, coco=str(coco)), pipeline, method, 1.0)
    assert shards.protocol.captions_sha256 == folder.protocol.captions_sha256
    assert shards.protocol.caption_rule == "lines of a file, in order"
    assert shards.protocol.reference_sha256 == folder.protocol.reference_sha256, "the same files"
    wanted = published(config.protocol)
    assert wanted is not None
    found = References(config, wanted, None).get(Inception(*detector.values()), "cpu")["fid"]
    assert found.statistics.count == 8  # type: ignore[union-attr]


def edited(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = root / "annotations" / "captions_val2014.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def captions_of_2017(root: Path) -> None:
    for part in ("annotations/captions_{}.json", "{}"):
        (root / part.format("val2014")).rename(root / part.format("val2017"))


def says_2017(root: Path) -> None:
    edited(root, lambda content: content.update(info={"year": 2017}))


def names_of_2017(root: Path) -> None:
    edited(root, lambda content: content["images"][0].update(file_name="000000000139.jpg"))


@pytest.mark.parametrize(
    ("spoil", "settings", "kind", "complaint"),
    [
        (captions_of_2017, {}, ConfigError, r"takes captions of COCO 2014; evaluator\.split=val of.*, val2017"),
        (captions_of_2017, {"split": "val2017"}, ConfigError, r"COCO 2014; evaluator\.split=val2017 of"),
        (says_2017, {}, ConfigError, r"\(evaluator\.coco\) holds captions of COCO 2017, this protocol takes .*2014"),
        (names_of_2017, {}, ConfigError, r"evaluator\.coco\) lists 000000000139\.jpg, which .*val2014 lacks"),
        (None, {"coco": "builtin:scenes"}, ConfigError, r"evaluator\.coco=builtin:scenes is not COCO"),
        (None, {"protocol": "gigagan-coco30k"}, ConfigError, r"has 8 captions, evaluator\.protocol=gig.*takes 30000"),
        (None, {"captions": "none.txt"}, DataError, r"evaluator\.captions=none\.txt can't be read"),
        (None, {"reference": "/nowhere"}, ConfigError, r"evaluator\.reference=/nowhere holds 0 images"),
        (None, {"reference": "/nowhere.npz"}, ConfigError, r"evaluator\.reference=/nowhere\.npz is not there"),
        (None, {"detector_file": "/none.pt"}, ConfigError, r"/none\.pt is not there: get it from https.*detector_file"),
        (None, {"detector_sha256": None}, ConfigError, r"evaluator\.detector_file=.* has sha256 .*not f58cb9b6"),
        (None, {"clip": "/nowhere"}, ConfigError, r"evaluator\.clip=/nowhere lacks config\.json, model\.safetensors"),
    ],
)  # fmt: skip
def test_what_a_protocol_lacks_is_one_line_naming_the_setting(
    detector: dict[str, str], coco: Path, tmp_path: Path, spoil: Callable[[Path], None] | None,
    settings: dict[str, Any], kind: type[RayDistillError], complaint: str,
) -> None:  # fmt: skip
    import shutil

    root = Path(shutil.copytree(coco, tmp_path / "coco"))
    if spoil is not None:
        spoil(root)
    defaults = {"protocol": "gigagan-coco30k@4", "coco": str(root), "grid_images": 1, **detector}
    with pytest.raises(kind, match=complaint) as caught:
        require_files(EvaluatorConfig(**defaults | settings))
    assert "\n" not in str(caught.value)


def test_statistics_for_patches_and_protocols_of_other_teachers_are_refused(
    detector: dict[str, str], images: Path, coco: Path, tmp_path: Path
) -> None:
    (tmp_path / "coco.npz").write_bytes(b"")
    two = EvaluatorConfig(
        protocol="dmd2-sdxl-coco10k@4",
        coco=str(coco),
        reference=str(tmp_path / "coco.npz"),
        grid_images=1,
        **detector,
    )
    with pytest.raises(ConfigError, match=r"evaluator\.reference=.*is one set of statistics.*patch-FID"):
        require_files(two)
    with pytest.raises(ConfigError, match=r"evaluator\.reference=none: .*EDM's cifar10-32x32\.npz"):
        require_files(EvaluatorConfig(protocol="edm-cifar10-50k", **detector))
    labels = EvaluatorConfig(protocol="edm-in64-5k")
    with pytest.raises(
        ConfigError, match=r"evaluator\.protocol=edm-in64-5k conditions on class labels.*captions: ch"
    ):
        require_conditions(labels, by_class=False)
    with pytest.raises(
        ConfigError, match=r"conditions on captions, this teacher \(teacher\.path\) on class labels"
    ):
        require_conditions(EvaluatorConfig(protocol="gigagan-coco5k"), by_class=True)
    with pytest.raises(ConfigError, match=r"evaluator\.clip=x scores captions"):
        require_conditions(replace(labels, clip="x"), by_class=True)
    with pytest.raises(ConfigError, match=r"edm-in64-5k judges 64x64 images, .* 32x32"):
        cifar(**detector, protocol="edm-in64-5k", reference=str(images))
    with pytest.raises(
        ConfigError, match=r"evaluator\.best_by=accuracy: evaluator\.protocol=edm-in64-5k reports fid"
    ):
        replace(labels, best_by="accuracy")
    with pytest.raises(ConfigError, match=r"evaluator\.best_by=fid: evaluator\.protocol=toy reports toyfid"):
        EvaluatorConfig(best_by="fid")
    assert labels.best_metric == "eval/fid_5k"
    assert replace(labels, best_by="toykid").best_metric == "eval/kid_5k"
