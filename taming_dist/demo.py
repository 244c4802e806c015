"""Entry point: an interactive page for exports, in the browser.

python -m taming_dist.demo transformer=EXPORT vqgan=EXPORT [condition_vqgan=EXPORT] [port=7860]

With vqgan=EXPORT alone the page shows reconstructions. See docs/app.md.
"""

import tempfile

from taming_dist.app.config import DemoConfig
from taming_dist.app.models import load
from taming_dist.app.server import address, listen, quiet, serve
from taming_dist.config import hydra_entry


def main(config: DemoConfig) -> None:
    """Serve the page until this process is asked to stop.

    Raises:
        UserError: Gradio is missing, the port is taken, or the exports cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="taming-dist-demo-") as scratch:
        quiet(scratch)
        from taming_dist.app.page import page

        with listen(config.host, config.port) as listening:
            models = load(config)
            blocks, jobs, looks = page(models, scratch)
            print(f"the page is at {address(listening)} (Ctrl-C ends it)", flush=True)
            try:
                serve(blocks, listening, config.upload_mb, **looks)
            finally:
                jobs.close()


if __name__ == "__main__":
    hydra_entry("demo", DemoConfig, main)
