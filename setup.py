"The package `sortkd`, described by settings.ini, which nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
names = ("experiments", "hub", "workflow", "docs", "dev")
extras = {name: settings[f"{name}_requirements"].split() for name in names}
extras["all"] = sum((extras[name] for name in ("hub", "workflow")), [])
extras["dev"] = extras["all"] + extras["docs"] + extras["dev"]
for name in extras.keys() - {"experiments"}:
    extras[name] = extras["experiments"] + extras[name]

repository = f"https://github.com/{settings['user']}/{settings['repo']}"


def for_package_page(text: str) -> str:
    "README's links and figures, relative here, as addresses that work anywhere."
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/{settings['branch']}/", text)
    return re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/{settings['branch']}/", text)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=for_package_page(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=repository,
    project_urls={
        "Paper": "https://arxiv.org/abs/2508.16544",
        "Documentation": f"https://{settings['user']}.github.io/{settings['repo']}/",
        "Results": f"{repository}/blob/{settings['branch']}/results/README.md",
        "Changes": f"{repository}/blob/{settings['branch']}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    },
    license_expression="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {tested}" for tested in ["3 :: Only", *settings["tested_pythons"].split()]),
    ],
    keywords=settings["keywords"],
    # Named although it is the default: an editable install then puts this folder on the path, and `import sortkd` works from the
    # folder above a clone of that name, too.
    package_dir={"": "."},
    packages=find_packages(include=["sortkd", "sortkd.*"]),
    package_data={"sortkd": ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
