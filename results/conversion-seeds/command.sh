# Eight seeds, 240 stages, commit a60d2d5; those of seeds 0 to 2 are of ../conversion (copied stages).
# The other 150 took 17 min 26 s on two cores. learning_curve records are left out of results.jsonl.
python launch.py --config=configs/sweeps/alpha.py --jobs=2 --config.name=conversion-seeds \
    --config.sweep.alpha.methods=mean,svd-logit --config.sweep.alpha.kv_heads=0,4,1 \
    --config.sweep.alpha.alphas=0.,0.0025,0.005,0.01,0.02,0.05 \
    --config.sweep.alpha.seeds=0,1,2,3,4,5,6,7 --config.sweep.alpha.tasks=none
