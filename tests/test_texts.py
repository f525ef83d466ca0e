"""Texts: CLIP's ensembling by hand, their file, vocabularies, stand-ins, majorities."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.numpy import save_file
from tiny_store import make_tiny_store

from occfeat_targets.cli import main
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.semantics import CLASSES, IGNORED, class_numbers, majority
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.store.texts import Texts
from occfeat_targets.teachers import load_teacher
from occfeat_targets.teachers.base import TeacherSettings
from occfeat_targets.texts import VOCABULARY, embed, read_vocabulary, stand_in
from occfeat_train.query import texts_of

LETTERS = "abcdefghijklmnopqrstuvwxyz.{}"
ENDS = ["<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *ENDS]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    first, last = (words.index(end) for end in ENDS)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"hidden_size": 32, "projection_dim": 8}
    text = {"vocab_size": len(words), "bos_token_id": first, "eos_token_id": last}
    text |= {"pad_token_id": last}
    parts = {"vision_config": shape | {"image_size": 32}, "text_config": shape | text}
    model = transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.eval().save_pretrained(folder)
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder, model, words


def by_hand(clip, sentences):
    """Each sentence alone, letter by letter; the token of its end is what stands for it."""
    _, model, words = clip
    found = []
    for sentence in sentences:
        ids = [words.index(ENDS[0])]
        for word in sentence.split():
            parts = [part for piece in word.partition(".") for part in [piece] if part]
            for part in parts:  # the tokenizer takes a full stop for a word of its own
                ids += [words.index(letter) for letter in part[:-1]]
                ids.append(words.index(part[-1] + "</w>"))
        ids = torch.tensor([[*ids, words.index(ENDS[1])]])
        with torch.no_grad():
            hidden = model.text_model(input_ids=ids).last_hidden_state[0, -1]
            vector = (model.text_projection.weight @ hidden).double().numpy()
        found.append(vector / np.sqrt((vector**2).sum()))
    mean = sum(found) / len(found)
    return mean / np.sqrt((mean**2).sum())


def vocabulary(tmp_path, **changes):
    said = {"templates": ["a {}.", "the {} there"], "classes": {"car": ["car", "van"], "x": ["y"]}}
    path = tmp_path / "words.json"
    path.write_text(json.dumps(said | changes))
    return path


def test_prompts_are_the_mean_of_their_sentences(clip, tmp_path):
    texts = embed(read_vocabulary(vocabulary(tmp_path)), clip[0])
    assert (texts.prompts, texts.classes) == (["car", "van", "y"], [0, 0, 1])
    assert texts.class_names == ["car", "x"]
    for prompt, vector in zip(texts.prompts, texts.embeddings, strict=True):
        wanted = by_hand(clip, [f"a {prompt}.", f"the {prompt} there"])
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
    assert (texts.embeddings @ texts.embeddings.T)[~np.eye(3, dtype=bool)].max() < 0.9999


def test_the_file_of_texts_comes_back(clip, tmp_path):
    path, words = tmp_path / "texts.safetensors", vocabulary(tmp_path)
    asked = ["text", str(path), "--clip", str(clip[0]), "--vocabulary", str(words)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    texts = Texts.load(path)
    np.testing.assert_array_equal(
        texts.embeddings, embed(read_vocabulary(words), clip[0]).embeddings
    )
    assert (texts.find("x"), texts.find("van")) == ([2], [1])
    with pytest.raises(ConfigError, match="did you mean van"):
        texts.find("vam")


def test_likeness_is_more_than_that_to_any_other_class():
    rng = np.random.default_rng(5)
    unit, rows = (v / np.linalg.norm(v, axis=1)[:, None] for v in rng.normal(size=(2, 6, 4)))
    texts = Texts(rows, list("abcdef"), [0, 0, 1, 2, 1, 0], ["car", "x", "y"], "")
    for text, own, others in [("car", "abf", "cde"), ("x", "ce", "abdf"), ("b", "b", "cde")]:
        got = texts.likeness(text, unit)
        for feature, likeness in zip(unit, got, strict=True):
            cosine = {
                letter: sum(feature * row) for letter, row in zip("abcdef", rows, strict=True)
            }
            best = max(cosine[letter] for letter in own)
            assert abs(likeness - (best - max(cosine[letter] for letter in others))) < 1e-12
    alone = Texts(rows[:2], ["a", "b"], [0, 0], ["car"], "")
    np.testing.assert_allclose(alone.likeness("b", unit), unit @ rows[1])


def test_any_text_is_asked_by_the_clip_whose_features_the_store_has(clip, tmp_path, tiny_store):
    store = open_store(str(tiny_store))
    with pytest.raises(StoreError, match="features of another teacher"):
        texts_of(store, "a red car", None, clip[0])
    teacher = load_teacher(TeacherSettings(name=str(clip[0])))
    store.attrs["teacher"]["weights"] = teacher.weights
    found = texts_of(store, "a red car", None, clip[0])
    np.testing.assert_allclose(found.embeddings[0], by_hand(clip, ["a red car"]), atol=1e-5)
    without = open_store(str(make_tiny_store(tmp_path / "targets.zarr", dim=0)))
    with pytest.raises(StoreError, match="two spaces"):
        texts_of(without, "a red car", None, clip[0])


def test_the_package_has_the_words_of_pop3d():
    words = read_vocabulary(VOCABULARY)
    assert list(words.classes) == list(CLASSES)
    numbers = [4, 1, 2, 10, 2, 3, 4, 1, 4, 5, 2, 6, 3, 5, 15, 7]  # relatives of the paper's table
    assert [len(prompts) for prompts in words.classes.values()] == numbers
    assert len(set(words.templates)) == 85


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {}}, "classes"),
        ({"classes": {"car": []}}, "no prompt"),
        ({"classes": {"car": ["a"], "bus": ["a"]}}, "twice"),
        ({"templates": ["no place"]}, "template"),
        ({"words": 1}, "words"),
    ],
)
def test_odd_vocabularies_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_vocabulary(vocabulary(tmp_path, **changes))


def test_odd_files_are_refused(tmp_path):
    path, sound = (
        tmp_path / "a.safetensors",
        Texts(np.eye(2, 3, dtype="f4"), ["a", "b"], [0, 0], ["c"], ""),
    )
    sound.save(path)
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert Texts.load(path).prompts == ["a", "b"]
    with pytest.raises(StoreError, match="occfeat-targets text"):
        Texts.load(tmp_path / "none.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="is not of"):
        Texts.load(path)
    for changes in ({"classes": [0, 1]}, {"prompts": ["a"]}, {"embeddings": sound.embeddings * 2}):
        Texts(**(vars(sound) | changes)).save(path)
        with pytest.raises(StoreError, match="fit together"):
            Texts.load(path)
    save_file({"embeddings": sound.embeddings}, path, {"texts": "[" * 9999})
    with pytest.raises(StoreError, match="is not of"):
        Texts.load(path)


def test_what_is_no_clip_is_refused(tmp_path):
    words = read_vocabulary(VOCABULARY)
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="tokenizer's files of a CLIP"):
            embed(words, folder)


def test_the_majority_of_a_voxel_is_counted():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 40, 150)
    group[group == 7] = 8  # one without points
    classes = rng.choice([0, 1, 15, IGNORED], 150).astype(np.uint8)
    found = majority(group, classes, 40)
    ties = 0
    for g in range(40):
        votes = Counter(classes[group == g].tolist())
        most = max(votes.values(), default=0)
        best = [c for c, n in votes.items() if n == most]
        ties += len(best) > 1
        wanted = IGNORED if IGNORED in best or not best else min(best)
        assert found[g] == wanted
    assert ties > 3 and found[7] == IGNORED


def test_stand_ins_are_mean_directions_of_classes(tiny_lidar_store):
    store = open_store(str(tiny_lidar_store))
    texts = stand_in(str(tiny_lidar_store))
    assert texts.source.startswith("STAND-INS, no text")
    numbers, step = class_numbers(store.attrs["lidarseg_classes"]), store.attrs["point_step_m"]
    sums = {}
    for i in range(len(store)):
        if not store.split(i).endswith("train"):
            continue
        frame = store.frame(i)
        votes = {}
        for point, label in zip(frame["points"], frame["lidarseg"], strict=True):
            index, inside = store.grid.flat_index(point[None, :3] * step)
            if inside[0]:
                votes.setdefault(int(index[0]), []).append(int(numbers[label]))
        for voxel, cameras, q, scale in zip(
            *(frame[n] for n in ("voxel_index", "feature_cameras", "features", "feature_scale")),
            strict=True,
        ):
            counted = Counter(votes.get(int(voxel), [IGNORED]))
            most = max(counted.values())
            best = [c for c, n in counted.items() if n == most]
            if cameras and IGNORED not in best:
                feature = q.astype(float) * float(scale)
                length = np.sqrt((feature**2).sum())
                sums[min(best)] = sums.get(min(best), 0) + feature / max(length, 1e-12)
    assert texts.class_names == [[*CLASSES][c] for c in sorted(sums)]
    for c, vector in zip(sorted(sums), texts.embeddings, strict=True):
        wanted = sums[c] / np.sqrt((sums[c] ** 2).sum())
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
