"""Write docs/configuration.md, the page about every option: python tools/configuration_page.py"""

from pathlib import Path

from megatron.atomic import atomic_write
from megatron.config.page import configuration_page

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def main() -> None:
    """Write the page."""
    with atomic_write(PAGE) as file:
        file.write(configuration_page().encode())


if __name__ == "__main__":
    main()
