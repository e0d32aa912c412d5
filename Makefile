# What a user and CI run. `make` lists it.
.PHONY: help test judges check demo bench selinux

help:
	@echo 'make test    install the judges (Debian, apt), then check formatting, lints and every claim'
	@echo 'make demo    the main job on a built-in disk'
	@echo 'make selinux what SELinux denies, shown in a virtual machine'
	@echo 'make bench   speed, side by side with the peers that are installed'
	@echo 'make judges  install only what the tests judge with'

test: judges
	tools/run-tests

judges:
	tools/install-judges

selinux: judges
	cargo test --test selinux_guest -- --nocapture

demo:
	cargo run --release -- demo

bench:
	cargo bench --bench nbd
	cargo bench --bench vhost_user
	cargo bench --bench guest
	cargo bench --bench scale
	cargo bench --bench qcow2
	cargo bench --bench formats
