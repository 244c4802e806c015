"""The shards that tests of data use serve those of formats, too."""

from tests.data.conftest import (  # noqa: F401
    codes,
    few_files,
    image_bytes,
    train_inline,
    two_views,
    write_images,
)
