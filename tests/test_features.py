"""demo/features.py: the csv, the scale and the files; and what the extractors make of sound and pictures."""
import io
import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluate
import train

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import features  # noqa: E402

CLIP_FEATURES = features.clip_features

MINE = data.Task("mine", labels=("gut", "schlecht"), text_len=40)
ROWS = [(split, label) for split in ("train", "valid", "test") for label in MINE.labels * 2]


@pytest.fixture(autouse=True)
def two_features(request, monkeypatch):
    """Stands in for the libraries where a test does not ask for them. Audio's first feature never changes."""
    def extract(path: Path) -> dict:
        rng = np.random.default_rng(path.read_bytes()[0])
        frames = rng.normal(size=(2 if path.suffix == ".mp4" else 0, 2)) * 4 + 9
        return {"audio": np.c_[np.full(7, 0.1), rng.normal(size=(7, 2)) * 5 + 3], "video": frames}
    if "libraries" not in request.fixturenames:
        monkeypatch.setattr(features, "clip_features", extract)


@pytest.fixture
def libraries():
    """openSMILE and PyAV, which only demo/features.py needs; skips the test where they are not."""
    pytest.importorskip("opensmile")
    return pytest.importorskip("av")


def write_csv(folder: Path, rows=ROWS, head="split,label,text,file", encoding="utf-8") -> Path:
    """mine.csv and its clips, by turns two without pictures and two with."""
    lines = [head]
    for n, (split, label) in enumerate(rows):
        name = f"{n}.mp4" if n % 4 > 1 else f"{n}.wav"
        (folder / name).write_bytes(bytes([n]))
        lines.append(f'{split},{label},"Na, das ist ja schön {n}",{name}')
    path = folder / "mine.csv"
    path.write_text("\n".join(lines), encoding=encoding)
    return path


def run(*argv) -> int:
    return features.main([str(arg) for arg in argv])


def refusal(capsys, *argv) -> str:
    assert run(*argv) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and "Traceback" not in told
    return told[-1]


def test_from_a_csv_to_an_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.TASKS, "mine", MINE)
    table = write_csv(tmp_path)
    assert run(table) == 0
    assert data.main(["mine", "--data-dir", str(tmp_path)]) == 0, capsys.readouterr().out
    split = data.load_split(MINE, tmp_path, "train")
    assert split.id == ["0.wav", "1.wav", "2.mp4", "3.mp4"]
    assert split.label == [0, 1, 0, 1]
    assert split.text[0] == "Na, das ist ja schön 0"
    assert split.audio_len == [7, 7, 7, 7] and split.video_len == [0, 0, 2, 2]

    clip = tmp_path / "10.mp4"                          # of the test split; alone it gets the same numbers
    assert run(table, clip) == 0
    arrays = {kind: str(clip.with_suffix(f".{kind}.npy")) for kind in data.FEATURES}
    test = data.load_split(MINE, tmp_path, "test")
    for kind, array in arrays.items():
        np.testing.assert_array_equal(np.load(array), test.features(kind, 2))

    out = str(tmp_path / "run")
    train.main(["--data", "mine", "--data-dir", str(tmp_path), "--llm", str(DEMO / "llm"), "--epochs", "1",
                "--device", "cpu", "--out", out])
    capsys.readouterr()
    argv = [f"{out}/1111", "--text", "Na", "--json", "--audio", arrays["audio"], "--video", arrays["video"]]
    monkeypatch.setattr("sys.argv", ["eval.py", *argv])
    evaluate.main()
    assert json.loads(capsys.readouterr().out)["label"] in MINE.labels


def test_scale_is_that_of_all_frames_of_training(tmp_path):
    assert run(write_csv(tmp_path)) == 0
    splits = {split: data.load_split(MINE, tmp_path, split) for split in data.SPLITS}
    for kind, stds in (("audio", [0, 1, 1]), ("video", [1, 1])):
        x = np.concatenate(getattr(splits["train"], kind))
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(x.std(axis=0), stds, rtol=1e-5)
    other = np.concatenate(splits["valid"].audio)
    assert abs(other[:, 1:].mean()) > 1e-3              # it had no say


def test_pictures_that_training_has_none_of_are_left_out(tmp_path, capsys):
    table = write_csv(tmp_path, [("train", "gut"), ("train", "schlecht"), ("valid", "gut"), ("test", "gut")])
    assert run(table) == 0
    assert data.load_split(MINE, tmp_path, "valid").video_len == [0]
    capsys.readouterr()
    assert run(table, tmp_path / "3.mp4") == 0
    assert "--video" not in capsys.readouterr().out
    assert not (tmp_path / "3.video.npy").exists()


def test_intensities_are_numbers(tmp_path):
    assert run(write_csv(tmp_path, [("train", "-0.5"), ("valid", "1"), ("test", "0")])) == 0
    task = data.Task("mine", range=(-1.0, 1.0))
    assert features.number("0,3") == 0.3 and features.number("gut") == "gut"
    assert [data.load_split(task, tmp_path, split).label for split in data.SPLITS] == [[-0.5], [1.0], [0.0]]


def test_csv_of_a_spreadsheet(tmp_path):
    table = write_csv(tmp_path, encoding="utf-8-sig")   # with a mark of the encoding in front, and ";"
    lines = table.read_text(encoding="utf-8-sig").splitlines()
    lines = [line.replace(",", ";").replace("Na;", "Na,") for line in lines]
    table.write_text("\r\n".join([*lines, ";;;", ";;;"]), encoding="utf-8-sig")
    assert run(table) == 0
    assert data.load_split(MINE, tmp_path, "test").text[3] == "Na, das ist ja schön 11"


@pytest.mark.parametrize("how, told", [
    (dict(head="split,label,words,file"), "columns ['split', 'label', 'words', 'file']; expected split,"),
    (dict(rows=[("dev", "gut")]), "its splits are ['dev']; expected rows of each of train, valid, test"),
    (dict(rows=ROWS[:8]), "its splits are ['train', 'valid']; expected"),
    (dict(encoding="latin-1"), "not a csv in UTF-8"),
])
def test_bad_csv(how, told, tmp_path, capsys):
    assert told in refusal(capsys, write_csv(tmp_path, **how))


def test_bad_rows_and_files(tmp_path, monkeypatch, capsys):
    assert "mine.csv" in refusal(capsys, tmp_path / "mine.csv")
    table = write_csv(tmp_path)
    assert "mine_scale.json" in refusal(capsys, table, tmp_path / "0.wav")      # not there yet
    unquoted = table.read_text(encoding="utf-8").replace('"', "", 2)
    table.write_text(unquoted, encoding="utf-8")
    assert "row 2: no such file" in refusal(capsys, table)
    lines = [f"{split},gut,0.wav,Na, so was" for split in data.SPLITS]
    table.write_text("\n".join(["split,label,file,text", *lines]), encoding="utf-8")
    assert "or a text with ',', unquoted" in refusal(capsys, table)
    table = write_csv(tmp_path)
    (tmp_path / "2.mp4").unlink()
    assert f"row 4: no such file, {tmp_path / '2.mp4'}" in refusal(capsys, table)
    assert not list(tmp_path.glob("*.pkl"))


def spoil(monkeypatch, *names):
    """These clips cannot be used."""
    def extract(path, extract=features.clip_features):
        if path.name in names:
            raise features.BadClip(f"{path}: FFmpeg cannot read it")
        return extract(path)
    monkeypatch.setattr(features, "clip_features", extract)


def test_a_bad_clip_does_not_hold_up_the_others(tmp_path, monkeypatch, capsys):
    table = write_csv(tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, "1.wav", "6.mp4")
        assert run(table) == 1
        out, err = capsys.readouterr()
        assert refusal(capsys, table, tmp_path / "1.wav") == f"error: {tmp_path / '1.wav'}: FFmpeg cannot read it"
    assert err.splitlines()[-3:] == [
        f"row 3: {tmp_path / '1.wav'}: FFmpeg cannot read it",
        f"row 8: {tmp_path / '6.mp4'}: FFmpeg cannot read it",
        f"error: {table}: 2 of 12 clips are left out, see above; mend them and run this again, or go on without them"]
    assert "mine_train.pkl: 3 of 4 rows" in out and "mine_test.pkl: 4 of 4 rows" in out
    train, valid = (data.load_split(MINE, tmp_path, split) for split in ("train", "valid"))
    assert train.id == ["0.wav", "2.mp4", "3.mp4"] and valid.id == ["4.wav", "5.wav", "7.mp4"]
    assert train.text[1] == "Na, das ist ja schön 2" and train.video_len == [0, 2, 2]
    np.testing.assert_allclose(np.concatenate(train.audio).mean(axis=0), 0, atol=1e-6)

    assert run(table) == 0                              # they are mended
    assert "mine_train.pkl: 4 of 4 rows" in capsys.readouterr().out
    assert data.load_split(MINE, tmp_path, "valid").id == ["4.wav", "5.wav", "6.mp4", "7.mp4"]


def test_a_split_without_a_good_clip(tmp_path, monkeypatch, capsys):
    table = write_csv(tmp_path)
    clips_of = {"train": ("0.wav", "1.wav", "2.mp4", "3.mp4"), "valid": ("4.wav", "5.wav", "6.mp4", "7.mp4")}
    for split, clips in clips_of.items():
        with monkeypatch.context() as patch:
            spoil(patch, *clips)
            assert f"no clip of split {split} can be used; nothing is written" in refusal(capsys, table)
        assert not list(tmp_path.glob("*.pkl")) and not list(tmp_path.glob("*.json"))


def test_files_are_replaced_whole(tmp_path):
    table = write_csv(tmp_path)
    made = ["mine_train.pkl", "mine_valid.pkl", "mine_test.pkl", "mine_scale.json", "2.audio.npy", "2.video.npy"]
    assert run(table) == run(table, tmp_path / "2.mp4") == 0
    before = {name: (tmp_path / name).read_bytes() for name in made}
    for name in made:
        (tmp_path / f"{name}.old").hardlink_to(tmp_path / name)         # changes with a file that is written into
    for clip in (*tmp_path.glob("*.wav"), *tmp_path.glob("*.mp4")):
        clip.write_bytes(bytes([clip.read_bytes()[0] + 100]))
    assert run(table) == run(table, tmp_path / "2.mp4") == 0
    for name in made:
        assert (tmp_path / f"{name}.old").read_bytes() == before[name] != (tmp_path / name).read_bytes()


FITS = [[0.0] * 3, [1.0] * 3]                           # of the three audio features here


@pytest.mark.parametrize("scale", [
    "{", [1], {}, {"video": FITS}, {"audio": None}, {"audio": "ab"}, {"audio": 1}, {"audio": [1, 2]},
    {"audio": FITS[:1]}, {"audio": [[float("inf")] * 3, [1.0] * 3]}, {"audio": [[0.0] * 25, [1.0] * 25]},
    {"audio": [[0.0] * 3, [1.0] * 2]}, {"audio": [[0.0] * 3, [1.0, 0.0, 1.0]]},
    {"audio": [[0.0] * 3, [1.0, float("nan"), 1.0]]},
    {"audio": [[10**400] * 3, [1.0] * 3]}, {"audio": FITS, "video": FITS}, {"audio": FITS, "smell": FITS},
])
def test_damaged_scale(scale, tmp_path, capsys):
    table = write_csv(tmp_path)
    text = scale if isinstance(scale, str) else json.dumps(scale)
    (tmp_path / "mine_scale.json").write_text(text)
    told = refusal(capsys, table, tmp_path / "2.mp4")
    assert "mine_scale.json: " in told and "make it again" in told
    assert not list(tmp_path.glob("*.npy"))


def test_missing_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(features, "clip_features", CLIP_FEATURES)
    assert "pip install opensmile av torchvision" in refusal(capsys, write_csv(tmp_path))


# --- With the libraries: real sound and real pictures


def write_wav(path: Path, seconds: float, hertz: float = 150.0, rate: int = 44_100, channels: int = 2):
    """A voice of eight harmonics that begins in the middle of the clip."""
    t = np.arange(round(seconds * rate)) / rate
    x = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 9)) * (t > seconds / 2)
    samples = np.repeat((x * 9000).astype("<i2"), channels)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def write_mp4(av, path: Path, seconds: float, sound: bool = True):
    """Grey pictures, 10 a second, that become white; with a tone if wanted."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        audio = file.add_stream("aac", rate=16_000) if sound else None
        for n in range(round(10 * seconds)):
            picture = np.full((64, 64, 3), 100 if n < 5 * seconds else 255, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode(None))
        if audio:
            tone = np.sin(np.arange(round(16_000 * seconds)) * 0.06).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            file.mux(audio.encode(frame))
            file.mux(audio.encode(None))


def test_sound(libraries, tmp_path):
    write_wav(tmp_path / "a.wav", 2.0, hertz=110.0)
    x = features.clip_features(tmp_path / "a.wav")
    assert x["audio"].shape == (40, 25) and x["video"].shape == (0, 512)
    assert np.isfinite(x["audio"]).all()
    loudness, pitch = x["audio"][:, 0], x["audio"][:, 10]
    assert loudness[:18].max() < 0.1 < loudness[22:38].min()            # it is silent until 1 s
    np.testing.assert_allclose(pitch[25:35], 24, atol=0.3)              # 110 Hz: two octaves above 27.5 Hz
    write_wav(tmp_path / "b.wav", 0.05)
    with pytest.raises(features.BadClip, match="b.wav: 0.05 s of sound; expected at least 0.06"):
        features.clip_features(tmp_path / "b.wav")


def test_unreadable_clip(libraries, tmp_path):
    (tmp_path / "a.wav").write_text("no sound at all")
    with pytest.raises(features.BadClip, match="a.wav: FFmpeg cannot read it"):
        features.clip_features(tmp_path / "a.wav")


def test_clip_without_sound(libraries, tmp_path):
    write_mp4(libraries, tmp_path / "a.mp4", 1.0, sound=False)
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nSubtitles\n")
    for name in ("a.mp4", "a.srt"):
        with pytest.raises(features.BadClip, match=f"{name}: no sound in it"):
            features.clip_features(tmp_path / name)


def aac(av, rate: int, layout: str) -> bytes:
    """A second of a tone of 220 Hz."""
    file = io.BytesIO()
    with av.open(file, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        tone = np.sin(np.arange(rate) * 2 * np.pi * 220 / rate).astype(np.float32) / 2
        tones = np.repeat(tone[None], 2 if layout == "stereo" else 1, axis=0)
        frame = av.AudioFrame.from_ndarray(tones, format="fltp", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_sound_that_changes_half_way(libraries, tmp_path):
    parts = [aac(libraries, 16_000, "mono"), aac(libraries, 44_100, "mono"), aac(libraries, 44_100, "stereo")]
    (tmp_path / "a.aac").write_bytes(b"".join(parts))
    x = features.clip_features(tmp_path / "a.aac")
    assert abs(len(x["audio"]) - 60) <= 5                               # 3 s, and what the encoder adds
    pitch = x["audio"][:, 10]
    for part in (pitch[5:15], pitch[26:36], pitch[47:57]):
        np.testing.assert_allclose(part, 36, atol=0.3)                  # three octaves above 27.5 Hz


def test_pictures(libraries, tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision").models
    resnet18 = models.resnet18
    monkeypatch.setattr(models, "resnet18", lambda weights: resnet18())         # random weights: no download
    features.picture_encoder.cache_clear()
    write_mp4(libraries, tmp_path / "a.mp4", 2.0)
    x = features.clip_features(tmp_path / "a.mp4")
    assert x["audio"].shape[1] == 25 and abs(len(x["audio"]) - 40) <= 2
    assert x["video"].shape == (8, 512)                                 # 4 a second
    step = np.abs(np.diff(x["video"], axis=0)).max(axis=1)
    assert step.argmax() == 3                                           # grey until 1 s, white from then on
    features.picture_encoder.cache_clear()
