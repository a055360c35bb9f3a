"""The image data module as a training loop uses it."""

import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.module import ImageDataModule, PaddedBatches
from data.images.reading import PreloadedDataset, TooManyCorrupt, TrainDataset, pixels_of, read_eval
from data.images.source import CorruptImage, ImagesError, ImageSource, Sample
from data.images.sources import open_source
from data.stream import IndexStream


class Pictures(ImageSource):
    """Random pictures of 12 x 10 pixels in three classes; some cannot be read."""

    class_names = ("a", "b", "c")

    def __init__(self, length: int, broken: tuple[int, ...] = (), small: bool = False) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (length, 12, 10, 3), dtype=np.uint8)
        self.broken = broken
        self.small = small

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise CorruptImage(self.key(index), "torn")
        return Sample(self.pixels[index], index % 3, "", self.key(index))

    def key(self, index: int) -> str:
        return f"picture-{index}"

    def fingerprint(self) -> str:
        return "pictures"


def module_of(source: ImageSource, batch_size: int = 4, **options: object) -> ImageDataModule:
    config = ImagesConfig(size=8, train_view="random_resized_crop", flip=True)
    for name in set(options) & set(vars(config)):
        setattr(config, name, options.pop(name))
    module = ImageDataModule(config, batch_size, **options)  # type: ignore[arg-type]
    module._sources = {"train": source, "val": source}
    return module


def on_rank(module: ImageDataModule, rank: int, world_size: int, batches_seen: int = 0) -> ImageDataModule:
    lightning_module = SimpleNamespace(batches_seen=batches_seen)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, lightning_module=lightning_module
    )
    return module


def batches(module: ImageDataModule, count: int) -> list[dict[str, Tensor]]:
    return list(islice(module.train_dataloader(), count))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_batches_are_bytes_until_they_reach_the_device() -> None:
    module = module_of(Pictures(9))
    batch = batches(module, 1)[0]
    assert batch["pixels"].shape == (4, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
    assert torch.equal(batch["label"], batch["index"] % 3) and batch["label"].dtype == torch.int64
    pixels = module.on_after_batch_transfer(batch, 0)["pixels"]
    assert pixels.dtype == torch.float32 and -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grey", [False, True])
def test_grey_and_colour_go_into_each_other(channels: int, grey: bool) -> None:
    source = Pictures(4)
    if grey:
        source.pixels = source.pixels[..., 0].copy()
    assert batches(module_of(source, channels=channels), 1)[0]["pixels"].shape == (4, channels, 8, 8)


def test_batches_depend_on_neither_workers_nor_ranks() -> None:
    source = Pictures(11)
    alone = batches(module_of(source, batch_size=6, seed=3), 6)
    with_workers = batches(module_of(source, batch_size=6, seed=3, num_workers=2), 6)
    ranks = [batches(on_rank(module_of(source, batch_size=3, seed=3), rank, 2), 6) for rank in range(2)]
    for number, batch in enumerate(alone):
        assert same(batch, with_workers[number])
        assert same(batch, joined([ranks[0][number], ranks[1][number]]))


def test_resumed_loader_continues_exactly() -> None:
    source = Pictures(11)
    whole = batches(on_rank(module_of(source), 1, 2), 7)
    resumed = batches(on_rank(module_of(source), 1, 2, batches_seen=4), 3)
    assert all(same(first, second) for first, second in zip(whole[4:], resumed, strict=True))


def test_loading_leaves_the_global_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    batches(module_of(Pictures(5), num_workers=1), 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("flip", [False, True])
def test_preloaded_images_are_those_of_the_slow_way(flip: bool) -> None:
    source, config = Pictures(7), ImagesConfig(size=8, flip=flip)
    for places in islice(IndexStream(7, 5, seed=1), 5):
        preloaded = PreloadedDataset(source, config, seed=1).__getitems__(places)
        assert same(preloaded, TrainDataset(source, config, seed=1).__getitems__(places))
    assert isinstance(
        module_of(Pictures(3, small=True), train_view="center").train_dataloader().dataset, PreloadedDataset
    )


def test_corrupt_images_are_replaced_counted_and_named_once() -> None:
    dataset = TrainDataset(Pictures(6, broken=(2, 3)), ImagesConfig(size=8, max_corrupt_share=1.0), seed=0)
    with pytest.warns(UserWarning, match="picture-2: torn"), pytest.warns(UserWarning, match="picture-3: torn"):
        batch = dataset.__getitems__([(0, 2), (0, 5)])
    assert batch["index"].tolist() == [4, 5] and batch["label"].tolist() == [1, 2]
    assert (dataset.tally.tried, dataset.tally.corrupt) == (4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dataset.__getitems__([(0, 2), (0, 5)])
    assert same(batch, again) and dataset.tally.corrupt == 4


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_corrupt_images_end_the_run(num_workers: int) -> None:
    def run(broken: tuple[int, ...]) -> None:
        batches(module_of(Pictures(60, broken), num_workers=num_workers, max_corrupt_share=0.05), 60)

    run((7, 30))
    with pytest.raises(TooManyCorrupt, match=r"of 1\d\d images could not be read, more than images.max_corrupt_share"):
        run((7, 8, 20, 21, 30, 40))


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
def test_a_set_without_one_readable_image_ends_the_run() -> None:
    with pytest.raises(TooManyCorrupt, match="none of the 5 images"):
        batches(module_of(Pictures(5, broken=(0, 1, 2, 3, 4))), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shows_each_image_once_in_equally_many_batches(world_size: int) -> None:
    source = Pictures(10)
    ranks = [
        list(on_rank(module_of(source, validation_images=7), rank, world_size).val_dataloader())
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    rows = joined([batch for rank in ranks for batch in rank])
    real = rows["weight"] == 1
    assert rows["weight"].dtype == torch.float32 and rows["weight"].sum() == 7
    alone = joined(list(module_of(source, validation_images=7).val_dataloader()))
    assert sorted(rows["index"][real].tolist()) == sorted(alone["index"][alone["weight"] == 1].tolist())
    assert len(set(rows["index"][real].tolist())) == 7


def test_padded_batches_are_full() -> None:
    rows = list(PaddedBatches(5, 2, rank=1, world_size=2))
    assert rows == [[(2, 1.0), (3, 1.0)], [(0, 0.0), (0, 0.0)]]


def test_corrupt_images_in_validation_fail_by_name_or_weigh_nothing() -> None:
    source = Pictures(4, broken=(1,))
    with pytest.raises(CorruptImage, match="picture-1: torn"):
        list(module_of(source).val_dataloader())
    batch = joined(list(module_of(source, skip_corrupt=True).val_dataloader()))
    assert batch["weight"].sum() == 3 and batch["index"][batch["weight"] == 0].tolist() == [1]


def test_evaluation_fails_by_name_or_leaves_out() -> None:
    source, config = Pictures(4, broken=(1,)), ImagesConfig(size=8)
    with pytest.raises(CorruptImage, match="picture-1"):
        pixels_of(source, range(4), config)
    with pytest.raises(CorruptImage, match="picture-1"):
        read_eval(source, 1, config)
    config.skip_corrupt = True
    assert pixels_of(source, range(4), config).shape == (3, 3, 8, 8)
    views = [read_eval(source, index, config) for index in (3, 1)]
    assert [view.readable for view in views] == [True, False]
    assert torch.equal(pixels_of(source, [3], config, flip=True)[0], views[0].pixels.flip(-1))


def test_an_image_that_does_not_fit_the_view_is_named() -> None:
    with pytest.raises(ImagesError, match="picture-.: an image of 10 x 12 does not fit"):
        batches(module_of(Pictures(3), train_view="pad"), 1)


class Counter(L.LightningModule):
    """Learns nothing, passes each batch to ``note``, and counts batches across checkpoints."""

    def __init__(self, note: Callable[[dict[str, Tensor]], None]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.note = note
        self.batches_seen = 0

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.note(batch)
        self.batches_seen += 1
        return (self.weight * batch["pixels"].mean()).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        assert batch["pixels"].dtype == torch.float32

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.batches_seen = int(checkpoint["batches_seen"])  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def train(steps: int, checkpoint: str | None = None) -> tuple[list[Tensor], L.Trainer]:
        seen: list[Tensor] = []
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Counter(lambda batch: seen.append(batch["pixels"])), module_of(Pictures(11)), ckpt_path=checkpoint)
        return seen, trainer

    whole, _ = train(7)
    begun, trainer = train(4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(7, str(tmp_path / "half.ckpt"))
    assert len(begun) == 4 and len(resumed) == 3
    assert all(torch.equal(first, second) for first, second in zip(whole, begun + resumed, strict=True))


def test_real_folder_through_the_module(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / f"class-{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (9, 9 + number), number).save(folder / f"{number}.png")
    config = ImagesConfig(path=str(tmp_path), size=8, val_share=0.25)
    module = ImageDataModule(config, batch_size=4, seed=0)
    assert module.class_names == ("class-0", "class-1")
    seen = joined(batches(module, 3))
    train = open_source(config, "train")
    for pixels, label, index in zip(seen["pixels"], seen["label"], seen["index"], strict=True):
        number = int(Path(train.key(int(index))).stem)
        assert pixels.unique().tolist() == [number] and label == number % 2
    assert joined(list(module.val_dataloader()))["weight"].sum() == 3
