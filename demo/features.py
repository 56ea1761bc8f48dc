"""From your own clips to the files that data.py and eval.py read. Nothing else needs this script.

    pip install opensmile av torchvision        # torchvision: only for clips with pictures
    python demo/features.py mine.csv            # -> mine_{train,valid,test}.pkl, mine_scale.json
    python demo/features.py mine.csv new.mp4    # a new clip on mine's scale -> new.audio.npy, new.video.npy

The csv is named like its task in TASKS (data.py). Its columns: split (train, valid, test), label (a class or
an intensity), text, and file: a clip that FFmpeg reads, relative to the csv. Each clip has sound; one without
pictures counts as one without video. Pickles lie beside the csv, arrays beside the clip.

A clip that cannot be used does not hold up the others: the pickles are written without it, and the command
ends with each such clip and its reason, and exit code 1. The pickles can be used as they are. Once the clips
are mended, the same command makes all of it anew, the scale too. If no clip of a split can be used, nothing is
written.

audio   (La, 25), 20 frames a second: openSMILE's eGeMAPSv02 low-level descriptors, one each 10 ms, averaged
        over 50 ms. In order: loudness, alpha ratio, Hammarberg index, slopes 0-500 and 500-1500 Hz, spectral
        flux, MFCC 1-4, F0 (semitones above 27.5 Hz), jitter, shimmer, HNR, H1-H2, H1-A3, and frequency,
        bandwidth and amplitude of the formants 1, 2, 3. From F0 on, 0 is no voice (amplitudes: -201), and
        the frame at a voice's edge lies in between. openSMILE's licence forbids use in products.
video   (Lv, 512), 4 frames a second: the picture's middle, a square, through torchvision's ResNet-18, trained
        on ImageNet, without its last layer. It knows what is to be seen, but was not made for faces, and sees
        pictures as they are stored: turn a telephone's upright.

From each feature its mean over the training split's frames is taken away, and it is divided by its standard
deviation there, or by 1 if it never changes. NAME_scale.json keeps both: new clips need the same numbers.
"""
import argparse
import csv
import importlib
import io
import json
import math
import pickle
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SPLITS  # noqa: E402
from support.files import UserError, read_json, write_atomic  # noqa: E402

COLUMNS = ("split", "label", "text", "file")
SOUND_RATE = 16_000             # samples a second, mono
SHORTEST = 0.06                 # seconds of sound that openSMILE can analyse
AVERAGED = 5                    # frames of 10 ms: 100 a second would be slow through an LSTM
PICTURE_RATE = 4                # a second; the other pictures are left out
PICTURE_DIM = 512


class BadClip(UserError):
    """A clip that cannot be used. The others can."""


# --- One clip -----------------------------------------------------------------------------------------------
def library(name: str):
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:       # not there, or built for another torch
        advice = "pip install opensmile av torchvision, from the index that torch is from"
        raise UserError(f"{error}: {advice}") from None


@cache
def picture_encoder():
    """The network, whose weights are downloaded at first use, and what makes its input of a picture."""
    models = library("torchvision").models
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    try:
        net = models.resnet18(weights=weights)
    except OSError as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"{weights.url} was not downloaded ({error}); put it into {folder}") from None
    net.fc = torch.nn.Identity()                                # instead of 1000 classes
    return net.eval(), weights.transforms()


@torch.inference_mode()
def picture_features(frame) -> np.ndarray:
    """(512,)"""
    net, prepare = picture_encoder()
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return net(prepare(picture)[None])[0].numpy()


def sound_features(samples: np.ndarray) -> np.ndarray:
    """(La, 25)"""
    smile = library("opensmile")
    encoder = smile.Smile(smile.FeatureSet.eGeMAPSv02, smile.FeatureLevel.LowLevelDescriptors)
    x = encoder.process_signal(samples, SOUND_RATE).to_numpy()
    parts = [x[i:i + AVERAGED] for i in range(0, len(x), AVERAGED)]
    return np.stack([part.mean(axis=0) for part in parts])


def new_resampler():
    """Takes frames of one layout and rate."""
    return library("av").AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)


def clip_features(path: Path) -> dict:
    """{"audio": (La, 25), "video": (Lv, 512)}, Lv 0 without pictures. Raises BadClip for an unfit file."""
    av = library("av")
    sound = []
    video = []
    resampler = new_resampler()
    layout = None                                               # of the sound; with its rate and format
    due = 0.0                                                   # seconds, of the next picture
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            if not file.streams.audio:
                raise BadClip(f"{path}: no sound in it; expected at least {SHORTEST} s")
            start = (file.start_time or 0) / av.time_base
            streams = [*file.streams.audio[:1], *file.streams.video[:1]]
            for frame in file.decode(streams):
                if isinstance(frame, av.AudioFrame):
                    now = frame.sample_rate, frame.layout.name, frame.format.name
                    if now != layout:                           # at first, and where it changes half-way
                        sound += resampler.resample(None)       # what it held back
                        resampler = new_resampler()
                        layout = now
                    sound += resampler.resample(frame)
                elif frame.time is not None and frame.time - start >= due:      # a cover has no time
                    video.append(picture_features(frame))
                    due = (math.floor((frame.time - start) * PICTURE_RATE) + 1) / PICTURE_RATE
        sound += resampler.resample(None)
    except av.FFmpegError as error:
        raise BadClip(f"{path}: FFmpeg cannot read it ({error.strerror})") from None
    seconds = sum(piece.samples for piece in sound) / SOUND_RATE
    if seconds < SHORTEST:
        raise BadClip(f"{path}: {seconds:.2f} s of sound; expected at least {SHORTEST} s")
    samples = np.concatenate([piece.to_ndarray()[0] for piece in sound])
    video = np.reshape(video, (-1, PICTURE_DIM))                # also where there is no picture
    return {"audio": sound_features(samples), "video": video.astype(np.float32)}


# --- The scale: {"audio": (25 means, 25 standard deviations), "video": ... if training has any} -------------
def measure(clips: list) -> dict:
    scale = {}
    for kind in clips[0]:
        x = np.concatenate([clip[kind] for clip in clips]).astype(np.float64)
        if len(x) > 0:
            mean = x.mean(axis=0)
            std = x.std(axis=0)
            std[std <= 1e-6 * np.abs(mean)] = 1                 # it never changes, but for rounding
            scale[kind] = mean.tolist(), std.tolist()
    return scale


def check_scale(scale: dict, clip: dict, file: Path):
    """Raises UserError unless the file's scale has a mean and a deviation for each of the clip's features."""
    for kind, numbers in scale.items():
        width = clip[kind].shape[1] if kind in clip else 0
        try:
            mean, std = np.array(numbers, dtype=np.float64)
            fits = mean.shape == (width,) and np.isfinite([mean, std]).all() and (std > 0).all()
        except (TypeError, ValueError, OverflowError):          # not two lists of numbers
            fits = False
        if not fits:
            raise UserError(f"{file}: expected {width} means and {width} standard deviations of {kind!r:.40} "
                            "features; make it again from its csv")


def scaled(clip: dict, scale: dict) -> dict:
    """The clip's features on this scale; no frames of a kind that training has none of."""
    x = {kind: frames[:0] for kind, frames in clip.items()}
    for kind, (mean, std) in scale.items():
        x[kind] = ((clip[kind] - mean) / std).astype(np.float32)
    return x


# --- A data set, and a new clip for it ----------------------------------------------------------------------
def read_rows(path: Path) -> list:
    """The csv's rows, {column: text}. Raises UserError; it counts rows as a spreadsheet does."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = max(",;\t", key=file.readline().count)  # Excel's is ";" in much of Europe
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, restval="")
            rows = list(reader)
            while rows and not any(rows[-1].values()):          # as a spreadsheet may end
                rows.pop()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a csv in UTF-8 ({error}); a new clip comes after its csv") from None
    if not set(COLUMNS).issubset(reader.fieldnames or []):
        raise UserError(f"{path}: columns {reader.fieldnames}; expected {', '.join(COLUMNS)}")
    found = sorted({row["split"] for row in rows})
    if found != sorted(SPLITS):
        raise UserError(f"{path}: its splits are {found}; expected rows of each of {', '.join(SPLITS)}")
    for n, row in enumerate(rows, start=2):
        clip = path.parent / row["file"]
        if None in row or not clip.is_file():                   # None: what has no column
            raise UserError(f"{path}, row {n}: no such file, {clip}, or a text with {delimiter!r}, unquoted")
    return rows


def number(label: str) -> str | float:
    """An intensity as a number, a class as it is."""
    try:
        return float(label.replace(",", "."))
    except ValueError:
        return label


def analyse(rows: list, folder: Path):
    """(row, features) of each clip that can be used, and for each other one a line that says why not."""
    used = []
    bad = []
    for n, row in enumerate(tqdm(rows, unit="clip"), start=2):
        try:
            used.append((row, clip_features(folder / row["file"])))
        except BadClip as error:
            bad.append(f"row {n}: {error}")
    return used, bad


def write_dataset(path: Path, scale_file: Path):
    """Raises UserError if clips had to be left out, once all else is written."""
    rows = read_rows(path)
    used, bad = analyse(rows, path.parent)
    for line in bad:
        print(line, file=sys.stderr)
    for split in SPLITS:
        if all(row["split"] != split for row, _ in used):
            raise UserError(f"{path}: no clip of split {split} can be used; nothing is written")
    scale = measure([clip for row, clip in used if row["split"] == "train"])
    write_atomic(scale_file, json.dumps(scale).encode())
    for split in SPLITS:
        entries = []
        for row, clip in used:
            if row["split"] == split:
                x = scaled(clip, scale)
                lengths = {"audio_len": len(x["audio"]), "video_len": len(x["video"])}
                features = {"text": row["text"], **x, **lengths}
                entries.append({"id": row["file"], "label": number(row["label"]), "features": features})
        target = path.with_name(f"{path.stem}_{split}.pkl")
        write_atomic(target, pickle.dumps(entries, protocol=4))
        n = sum(row["split"] == split for row in rows)
        print(f"{target}: {len(entries)} of {n} rows")
    if bad:
        raise UserError(f"{path}: {len(bad)} of {len(rows)} clips are left out, see above; mend them and run "
                        "this again, or go on without them")


def write_clip(path: Path, scale_file: Path):
    """Prints the arrays' files as eval.py's flags."""
    scale = read_json(scale_file, ("audio",))
    clip = clip_features(path)
    check_scale(scale, clip, scale_file)
    for kind, frames in scaled(clip, scale).items():
        if len(frames) > 0:
            buffer = io.BytesIO()
            np.save(buffer, frames)
            target = path.with_suffix(f".{kind}.npy")
            write_atomic(target, buffer.getvalue())
            print(f"--{kind} {target}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="the data set")
    parser.add_argument("clip", type=Path, nargs="?", help="a new clip")
    args = parser.parse_args(argv)
    scale_file = args.csv.with_name(f"{args.csv.stem}_scale.json")
    try:
        if args.clip:
            write_clip(args.clip, scale_file)
        else:
            write_dataset(args.csv, scale_file)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
