"""LoRA on a Stable Diffusion of random weights, in the folder format of the real ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at, weights

from nomadam.experiments.configuration import from_json, override, to_json
from nomadam.experiments.data import concept_pictures
from nomadam.experiments.diffusion import stable_diffusion_lora
from nomadam.runs import Interrupted

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as diffusers saves it, with every part as small as can be."""
    folder = tmp_path_factory.mktemp("sd")
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "words" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words", model_max_length=20)
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "weights")
    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for number, (shape, ending) in enumerate(
        [((20, 30), "png"), ((16, 16), "jpg"), ((40, 18), "webp")]
    ):
        pixels = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.{ending}")
    (folder / "pictures" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    return tmp_path / "sd"


def small(folder, optimizer="sgd_sai", **changes):
    fields = {
        "data.weights": str(folder / "weights"),
        "data.pictures": str(folder / "pictures"),
        "data.size": "16",
        "data.draws": "2",
        "model.sampling_steps": "2",
        "model.num_samples": "2",
        "precision": "fp32",
        "steps": "4",
        "evaluate_every": "2",
    }
    return override(stable_diffusion_lora(optimizer), fields | changes)


def test_it_learns_with_adapters_that_other_programs_can_load(folder, tmp_path):
    run = small(folder)
    assert from_json(to_json(run)) == run
    result = go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(2, "SIGTERM"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 4)
    assert result["status"] == "finished"
    with Image.open(tmp_path / "whole" / "samples.png") as opened:
        assert opened.size == (2 * 18, 18)
    trained = run.model.build(weights=run.data.weights).eval()
    fresh = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.load_state_dict(weights(tmp_path / "whole", 4), strict=False)
    moved = {n for n, t in trained.state_dict().items() if not torch.equal(t, fresh[n])}
    assert moved and all("lora" in name for name in moved)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        run.data.weights, local_files_only=True, safety_checker=None
    )
    batch = next(run.data.load().validation_batches(batch_size=2))
    said = []
    for load in (False, True):
        if load:
            pipeline.load_lora_weights(tmp_path / "whole" / "pytorch_lora_weights.safetensors")
        with torch.no_grad():
            said.append(pipeline.unet.eval()(batch.noised, batch.steps, batch.texts).sample)
    with torch.no_grad():
        own = trained(batch.noised, batch.steps, batch.texts).sample
    torch.testing.assert_close(own, said[1])
    assert not torch.allclose(own, said[0], rtol=1e-5, atol=1e-7)


def test_rows_are_pure_draws_of_latents_and_texts(folder):
    run = small(folder)
    dataset = run.data.load()
    assert dataset.means.shape == (4, 4, 8, 8) and dataset.held_out.shape == (1, 4, 8, 8)
    assert dataset.texts.shape == (3, 20, 8) and dataset.prompt == "a photo of a sks"
    one, same, other = (
        dataset.train_batch(seed=seed, step=3, micro=1, batch_size=64) for seed in (5, 5, 6)
    )
    assert torch.equal(one.noised, same.noised) and not torch.equal(one.noised, other.noised)
    assert len({tuple(text.flatten().tolist()) for text in one.texts}) == 3
    assert one.steps.min() >= 0 and 900 < one.steps.max() < 1000
    share = dataset.scheduler.alphas_cumprod[one.steps][:, None, None, None]
    latents = (one.noised - (1 - share).sqrt() * one.target) / share.sqrt()
    early = one.steps < 300  # later, little of the latent is left to be found
    gaps = (latents[early][:, None] - dataset.means[None]).abs() / dataset.deviations[None]
    assert gaps.flatten(2).mean(2).min(1).values.max() < 2
    whole = next(dataset.validation_batches(batch_size=9))
    parts = list(dataset.validation_batches(batch_size=1))
    assert torch.equal(torch.cat([part.noised for part in parts]), whole.noised)
    assert len(whole) == 2 and len(whole[:1]) == 1


def test_pictures_of_16_bits_and_transparent_ones_are_seen_as_they_are_shown(tmp_path):
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    pixels = concept_pictures._pixels(tmp_path / "16.png", 16)
    expected = torch.from_numpy(ramp / 32767.5 - 1).float()
    assert torch.allclose(pixels, expected.expand(3, 16, 16), atol=1 / 127)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 8, 16))
    for shown, name in ((clear, "clear.png"), (clear.quantize(), "palette.png")):
        shown.save(tmp_path / name)
        pixels = concept_pictures._pixels(tmp_path / name, 16)
        assert pixels[:, 3, 12].tolist() == [1.0, 1.0, 1.0]  # nothing stands on white
        assert pixels[:, 3, 3].tolist() == [1.0, -1.0, -1.0]


def test_a_picture_of_16_bits_that_lies_on_its_side_is_turned(tmp_path):
    ramp = np.zeros((16, 16), np.uint16)
    ramp[0] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    Image.fromarray(ramp).save(tmp_path / "x.png", exif=exif)
    pixels = concept_pictures._pixels(tmp_path / "x.png", 16)
    assert (pixels[:, :, 15] == 1).all() and (pixels[:, :, :15] == -1).all()


def test_the_velocity_is_the_target_where_the_schedule_says_so(copied):
    path = copied / "weights" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    dataset = small(copied).data.load()
    batch = next(dataset.validation_batches(batch_size=2))
    share = dataset.scheduler.alphas_cumprod[batch.steps][:, None, None, None]
    # From v = sqrt(a) noise - sqrt(1 - a) x and the noised latent, x is found again.
    latents = share.sqrt() * batch.noised - (1 - share).sqrt() * batch.target
    torch.testing.assert_close(latents, dataset.held_out.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)
    path.write_text(json.dumps({**config, "prediction_type": "sample"}))
    with pytest.raises(ValueError, match="predicts 'sample'"):
        small(copied).data.load()


def spoil(path, content=None):
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        ("weights", None, "must be a local folder"),
        ("weights/tokenizer", None, "missing: tokenizer/"),
        ("weights/unet/diffusion_pytorch_model.safetensors", None, "missing: unet/.*safetensors"),
        ("weights/vae/diffusion_pytorch_model.safetensors", b"torn", "can not be read"),
        ("weights/text_encoder/config.json", b"{", "can not be read"),
        ("pictures", None, "must be a folder of pictures"),
        ("pictures/0.png", b"no picture", "0.png can not be read as a picture"),
        ("pictures/1.jpg", b"", "1.jpg can not be read as a picture"),
        # A format whose reader starts a program, under the name of another one.
        ("pictures/1.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can not be read"),
    ],
)
def test_what_is_missing_or_damaged_is_named_before_training(copied, place, content, message):
    spoil(copied / place, content)
    with pytest.raises(ValueError, match=message):
        small(copied).data.load()


def test_pickled_weights_are_never_read(copied):
    unet = copied / "weights" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="missing: unet/"):
        small(copied).data.load()
    with pytest.raises(ValueError, match="missing: unet/"):
        small(copied).model.build(weights=str(copied / "weights"))


def test_a_torn_unet_one_picture_and_an_odd_size_are_refused(copied):
    run = small(copied)
    with pytest.raises(ValueError, match="multiple of the VAE's 2"):
        override(run, {"data.size": "17"}).data.load()
    for name in ("1.jpg", "2.webp"):
        (copied / "pictures" / name).unlink()
    with pytest.raises(ValueError, match="at least 2 pictures.*found 1"):
        run.data.load()
    spoil(copied / "weights" / "unet" / "diffusion_pytorch_model.safetensors", b"torn")
    with pytest.raises(ValueError, match="unet can not be read"):
        run.model.build(weights=run.data.weights)
    with pytest.raises(ValueError, match="each with one {}"):
        override(run, {"data.templates": "a photo"})


def put_weights(weights, source, target):
    (file,), (other,) = ((weights / part).glob("*.safetensors") for part in (source, target))
    shutil.copy(file, other)


def configure(part, **changes):
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("put", "part", "words"),
    [
        (lambda w: put_weights(w, "unet", "text_encoder"), "text_encoder", "the weights lack .*"),
        (lambda w: put_weights(w, "vae", "unet"), "unet", "the weights lack .* and others"),
        (lambda w: configure(w / "unet", layers_per_block=2), "unet", "weights lack .*resnets.1"),
        (lambda w: configure(w / "vae", layers_per_block=2), "vae", "weights lack .*resnets.2"),
        (
            lambda w: configure(w / "text_encoder", num_hidden_layers=2),
            "text_encoder",
            "the weights lack .*layers.1",
        ),
        (
            lambda w: configure(w / "unet", cross_attention_dim=16),
            "unet",
            "the shape differs of .*attn2.to_k.weight",
        ),
        (
            lambda w: shutil.copy(w / "vae" / "config.json", w / "unet" / "config.json"),
            "unet",
            "config.json has _class_name = 'AutoencoderKL', not 'UNet2DConditionModel'",
        ),
    ],
)
def test_weights_of_another_part_or_size_are_named(copied, put, part, words):
    weights = copied / "weights"
    put(weights)
    with pytest.raises(ValueError, match=f"{part} can not be read as .*{words}"):
        small(copied).data.load()
        small(copied).model.build(weights=str(weights))


def test_a_unet_that_asks_for_more_than_a_text_is_refused(copied):
    unet = copied / "weights" / "unet"
    shape = diffusers.UNet2DConditionModel.load_config(unet)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    more |= {"projection_class_embeddings_input_dim": 32}
    diffusers.UNet2DConditionModel.from_config({**shape, **more}).save_pretrained(unet)
    with pytest.raises(ValueError, match="its UNet has addition_embed_type = 'text_time'"):
        small(copied).model.build(weights=str(copied / "weights"))


def test_a_unet_for_inpainting_is_refused(copied):
    unet = copied / "weights" / "unet"
    shape = {**diffusers.UNet2DConditionModel.load_config(unet), "in_channels": 9}
    diffusers.UNet2DConditionModel.from_config(shape).save_pretrained(unet)
    with pytest.raises(ValueError, match="its UNet has in_channels = 9, as one for inpainting"):
        small(copied).model.build(weights=str(copied / "weights"))


def test_folders_may_begin_at_home_and_hold_more_than_is_read(copied, monkeypatch):
    monkeypatch.setenv("HOME", str(copied))
    digest = small(copied).data.load().description["sha256"]
    unet = copied / "weights" / "unet"
    (unet / ".cache").mkdir()
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    (copied / "pictures" / ".0.png").write_bytes(b"not read")
    (copied / "pictures" / "more.png").mkdir()
    at_home = {"data.weights": "~/weights", "data.pictures": "~/pictures"}
    run = small(copied, **at_home)
    dataset = run.data.load()
    assert dataset.description["sha256"] == digest
    assert dataset.description["train_images"] == 2
    run.model.build(**run.data.shape(dataset))
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    assert run.data.load().description["sha256"] != digest


def test_a_text_longer_than_the_encoder_reads_is_not_cut(copied):
    run = small(copied, **{"data.templates": "{}", "data.concept": "a" * 18})
    assert run.data.load().texts.shape == (1, 20, 8)
    with pytest.raises(ValueError, match="'a{19}' has 21 tokens .* must have at most 20"):
        override(run, {"data.concept": "a" * 19}).data.load()
