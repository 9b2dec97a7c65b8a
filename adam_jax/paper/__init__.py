"""The paper's experiments, figure by figure, on real data: an application of the library; nothing imports it.

* `formats`, `cifar`: reading files that may be damaged; `data`, `downloads`: where they are found.
* `problems`, `methods`: what is minimised, and by which optimizers.
* `training`, `saved`: many settings and seeds in one call, and work that can be gone on with.
* `lab`: what an experiment is and what it is given; `contest`: the template of Figures 1 to 3.
* `results`, `plots`: what an experiment hands back, and its picture.
* `figure1` and so on, `regret`: the experiments, each with its entry; `figures`: the registry that collects them.
* `command`, `report`: the command line, and what it says.

All of this needs the extra `paper`: `pip install "adam_jax[paper]"`.
"""
