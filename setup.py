"""Packaging: everything that can change is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
requirements = {name: settings[name].split() for name in settings if name.endswith("requirements")}
run, dev, cluster, peers = (requirements[f"{name}_requirements"] for name in ("run", "dev", "cluster", "peers"))
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_name"], f"{settings['lib_name']}.*"]),
    install_requires=requirements["requirements"],
    extras_require={"run": run, "dev": dev + run, "cluster": cluster, "peers": peers},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
