import io

import pyarrow as pa
import pytest
from make_parquet import RLAIF_V, UNICODE, draw_image, make_row, make_rows, write_rows
from PIL import Image

from fedvlm_jax.data.sources.registry import find_options, list_sets, read_table
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError


def test_reads_a_file_of_rlaif_v_form(tmp_path):
    rows = [make_row(n, question=text, chosen=text[::-1]) for n, text in enumerate(UNICODE)]
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    assert len(table) == len(UNICODE)
    assert table.columns == tuple(RLAIF_V.names)
    assert table.read_text("question") == list(UNICODE)
    assert table.read_text("chosen", [3, 1]) == [UNICODE[3][::-1], UNICODE[1][::-1]]
    assert table.read_image(2) == draw_image(2)


def test_a_folder_is_its_shards_in_order(tmp_path):
    rows = make_rows(30)
    write_rows(tmp_path / "x" / "b.parquet", rows[20:])
    write_rows(tmp_path / "x" / "a.parquet", rows[:20])
    assert read_table(str(tmp_path / "x")).read_text("idx") == [str(n) for n in range(30)]


def test_a_rewritten_file_is_read_anew(tmp_path):
    path = write_rows(tmp_path / "a.parquet", make_rows(3))
    assert len(read_table(str(path))) == 3
    write_rows(path, make_rows(5))
    assert len(read_table(str(path))) == 5


@pytest.mark.parametrize("form", ["bytes", "path", "struct of path"])
def test_images_may_be_bytes_or_paths_beside_the_file(tmp_path, form):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(draw_image(0))
    image, kind = {
        "bytes": (draw_image(0), pa.binary()),
        "path": ("pictures/0.png", pa.string()),
        "struct of path": (
            {"path": "pictures/0.png", "bytes": None},
            pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
        ),
    }[form]
    table = read_table(str(write_rows(tmp_path / "a.parquet", [make_row(0, image=image)], image=kind)))
    assert table.read_image(0) == draw_image(0)


@pytest.mark.parametrize("missing", ["image", "question", "chosen"])
def test_missing_columns_are_named_with_what_there_is(tmp_path, missing):
    path = write_rows(tmp_path / "a.parquet", make_rows(2), drop=[missing])
    with pytest.raises(UserError, match=rf"a\.parquet lacks '{missing}'; it has 'ds_name'.*Needed are 'image'"):
        read_table(str(path))


def test_rejected_is_optional(tmp_path):
    path = write_rows(tmp_path / "a.parquet", make_rows(2), drop=["rejected", "origin_split"])
    assert "rejected" not in read_table(str(path)).columns


def test_errors_name_the_file_and_the_fault(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere' is neither a named data set nor a path.*emoji"):
        read_table("nowhere")
    with pytest.raises(UserError, match="is of no form that is read"):
        read_table(str(tmp_path))
    (tmp_path / "junk.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"junk\.parquet cannot be read as parquet"):
        read_table(str(tmp_path))
    with pytest.raises(UserError, match="has no rows"):
        read_table(str(write_empty(tmp_path / "empty" / "a.parquet")))
    with pytest.raises(UserError, match="'image' is int64"):
        read_table(str(write_rows(tmp_path / "number.parquet", [make_row(0, image=3)], image=pa.int64())))


def write_empty(path):
    path.parent.mkdir()
    pa.parquet.write_table(RLAIF_V.empty_table(), path)
    return path


def test_shards_must_agree(tmp_path):
    write_rows(tmp_path / "a.parquet", [make_row(0, client="one")])
    write_rows(tmp_path / "b.parquet", [make_row(1)])
    with pytest.raises(UserError, match=r"b\.parquet and .*a\.parquet disagree.*'client'"):
        read_table(str(tmp_path))


def test_a_damaged_middle_is_one_clear_error(tmp_path):
    path = write_rows(tmp_path / "a.parquet", make_rows(200))
    content = bytearray(path.read_bytes())
    content[500:9000] = b"\xff" * 8500  # the footer at the end stays whole
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read to its end"):
        read_table(str(path))


def test_images_are_grouped_by_content(tmp_path):
    spoilt = [make_row(12, image=None), make_row(13, image={"bytes": b"", "path": "gone.png"})]
    rows = [*make_rows(12, pictures=4), *spoilt]
    table = read_table(str(write_rows(tmp_path / "a.parquet", rows)))
    images, index, missing = unique_images(table, range(14))
    assert len(images) == 4
    assert index.tolist() == [[0], [1], [2], [3]] * 3 + [[-1], [-1]]
    assert missing == {12: "no image", 13: "image file cannot be read"}
    again, other, _ = unique_images(table, [7, 3, 5])
    assert other.tolist() == [[0], [0], [1]]
    assert again.keys == (images.keys[3], images.keys[1])
    assert images.decode(2).tobytes() == Image.open(io.BytesIO(draw_image(2))).tobytes()


def test_transparency_is_laid_on_white(tmp_path):
    out = io.BytesIO()
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(out, "PNG")
    table = read_table(str(write_rows(tmp_path / "a.parquet", [make_row(0, image={"bytes": out.getvalue()})])))
    image = unique_images(table, [0])[0].decode(0)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_broken_and_truncated_images_are_found(tmp_path, kind):
    whole = draw_image(1, (300, 200), kind)
    spoilt = [whole, whole[: len(whole) // 2], whole[:20], b"not an image", b"\x00" * 50]
    table = read_table(
        str(write_rows(tmp_path / "a.parquet", [make_row(n, image={"bytes": b}) for n, b in enumerate(spoilt)]))
    )
    images, _, _ = unique_images(table, range(5))
    assert sorted(images.find_broken()) == [1, 2, 3, 4]
    assert images.decode(0).size == (300, 200)
    with pytest.raises(UserError, match="truncated"):
        images.decode(1)


def test_named_sets_are_found_by_looking():
    assert "emoji" in list_sets()
    assert all(find_options(name)().source == name for name in list_sets())
