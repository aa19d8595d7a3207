# Three seeds, 840 stages, commit a60d2d5, 90 min 37 s on two cores. Predictions, replicates and
# learning_curve records are left out of results.jsonl.
python launch.py --config=configs/sweeps/conversion.py --jobs=2
