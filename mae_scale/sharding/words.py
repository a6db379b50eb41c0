"""Meaning of the names of folders and files: splits, lists or masks."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SPLITS = {
    "train": "train training trn trainval entrenamiento entrainement apprentissage treino "
    "treinamento addestramento allenamento trening treningowy treningowe opleiding traning "
    "koulutus egitim latih تدريب обучение тренировка "
    "обучающая 训练 訓練 学習 학습 훈련",
    "val": "val valid validation dev eval evaluation validierung validacion validacao convalida "
    "validazione walidacja walidacyjny walidacyjne validatie validering validointi dogrulama "
    "валидация проверка 验证 驗證 検証 검증",
    "test": "test tests testing tst prueba pruebas essai teste verifica testowy testowe testi "
    "teszt uji اختبار тест 测试 測試 テスト 테스트",
    "other": "unlabeled unlabelled",
}
_NFKD = {
    unicodedata.normalize("NFKD", word): (split, word)
    for split, words in _SPLITS.items()
    for word in words.split()
}
# Other words in the names of folders of splits, such as ILSVRC2012_img_train or val_images.
_OTHER_WORDS = (
    "x t v s k in px img imgs image images photos pictures bilder jpg jpeg png folder dir set sets "
    "data dataset daten sdaten split part parts imagenet ilsvrc large small full standard crop "
    "cropped resized mini tiny final new raw all tr ts 集 集合 数据 用 用データ сет выборка"
)
_NEUTRAL = set(_OTHER_WORDS.split())
_GLUED = {unicodedata.normalize("NFKD", word) for word in _NEUTRAL if len(word) > 2 or word > "z"}
_MASKS = {
    "annotation", "annotations", "ann", "anns", "annots", "annotationsxml", "mask", "masks",
    "trimap", "trimaps", "segmentation", "segmentations", "seg", "segs", "segmentationclass",
    "segmentationobject", "groundtruth", "gt", "gtfine", "gtcoarse", "label", "labels", "labelids",
    "depth", "bboxes", "normals", "thumb", "thumbs", "thumbnail", "thumbnails", "maskes", "masken",
    "stuffthingmaps", "mascaras", "masques", "маски",
}  # fmt: skip
_BESIDE_MASKS = {"class", "object", "color", "colour", "fine", "coarse", "instance", "semantic",
                 "panoptic", "visuals", "ground", "truth", "binary", "instances"}  # fmt: skip
IMAGE_FOLDERS = {"images", "image", "img", "imgs", "jpegimages", "jpg", "jpeg", "png", "photos"}
# Folders that systems and tools put beside images, some with small copies of the images.
SYSTEM_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
LIST_SUFFIXES = {"txt", "csv", "tsv", "json", "jsonl", "lst", "mat", "xlsx"}


def _tokens(name: str) -> list[str]:
    """Return the words of a name; TrainSet, train_set and trainset have the same two words."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    tokens = _words(name)
    return tokens if any(t in _NFKD or t in _MASKS for t in tokens) else _words(parted)


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c) or c > "\u3000")
    tokens = []
    for token in re.findall(r"(?:[^\W\d_]|[\u3099\u309a])+", plain):
        if token in _NFKD or token in _MASKS:
            tokens.append(token)
            continue
        for word in _GLUED:
            for rest in (token.removesuffix(word), token.removeprefix(word)):
                if rest != token and (rest in _NFKD or rest in _MASKS):
                    tokens += [rest, word]
                    break
            else:
                continue
            break
        else:
            tokens.append(token)
    return tokens


@lru_cache(maxsize=65536)
def split_word(name: str) -> tuple[str | None, bool]:
    """Return the split that a folder's name means, and whether the name says nothing else."""
    tokens = _tokens(name)
    splits = {_NFKD[token][0] for token in tokens if token in _NFKD}
    if len(splits) != 1:
        return None, False
    rest = [token for token in tokens if token not in _NFKD]
    return splits.pop(), all(token in _NEUTRAL or token in _GLUED for token in rest)


def own_word(name: str) -> str:
    """Return the first word of a name that means a split, such as "train" or "trainval"."""
    return next((_NFKD[token][1] for token in _tokens(name) if token in _NFKD), "")


def may_list(name: str) -> bool:
    """Return whether a file's name says that it lists images, of splits or with their labels."""
    stem = name.partition(".")[0].casefold()
    return stem in ("metadata", "labels", "image_labels", "imagelabels") or bool(splits_in(name))


def splits_in(name: str) -> set[str]:
    """Return all splits that a name mentions; train_test_split.txt mentions two."""
    return {_NFKD[token][0] for token in _tokens(name) if token in _NFKD}


def says_nothing(name: str) -> bool:
    """Return whether a name has only numbers and words such as "images" or "part"."""
    return all(token in _NEUTRAL or token in _GLUED for token in _tokens(name))


@lru_cache(maxsize=65536)
def looks_like_masks(name: str) -> bool:
    """Return whether a folder's name means masks, annotations or small copies, and no class."""
    tokens = _tokens(name)
    joined = "".join(tokens)
    return joined in _MASKS or (
        any(token in _MASKS for token in tokens)
        and all(
            t in _MASKS or t in _NEUTRAL or t in _GLUED or t in _BESIDE_MASKS or t in _NFKD
            for t in tokens
        )
    ) or (set(tokens) >= {"ground", "truth"})  # fmt: skip
