"""Demo: the whole loop with the real parts, small enough for two CPU cores, ending in an HTML report.

mmseq demo                                     Meta-World: record, train, serve, drive, measure
mmseq demo --data PATH_TO_LEROBOT           the same on your own robot's data, without the simulator

runs/demo/data/{lerobot,human,episodes}   tokenizers/   tokens/   mix.yaml
         train/   checkpoint/   report.html   results.json
"""
