# make            build bin/meshd, bin/meshctl, bin/mesh, bin/meshd-wireguard
# make demo       three machines on this host, the whole story step by step
#                 (KEEP=1 leaves them running, make demo-down takes them away)
# make test       pure tests, one-subsystem tests in namespaces, whole stories
# make test-vm    the datapath on a kernel with WireGuard, in an emulated guest
# make test-kubernetes
#                 a real Kubernetes on three machines, with meshd as its network
# make check      formatting, vet, the arrows of the tree, go.mod
# make image      bin/meshd-image.tar, the container image of manifests/
# make bench      the figures, each against a reference in the same run
#                 (ONLY=tunnel,cni for some of them)
# make deps       install what all of this needs (Debian packages)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DELETE_ON_ERROR:

# One set of flags everywhere: another one would compile Kubernetes again.
export CGO_ENABLED := 0
export GOFLAGS := -trimpath -buildvcs=false

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
KUBERNETES := $(shell sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' go.mod)
K8S_VERSION := k8s.io/component-base/version
LDFLAGS := -s -w -X main.release=$(VERSION) \
	-X $(K8S_VERSION).gitVersion=$(KUBERNETES)+meshd \
	-X $(K8S_VERSION).gitMajor=1 -X $(K8S_VERSION).gitMinor=$(word 2,$(subst ., ,$(KUBERNETES)))

.PHONY: all build image deps demo demo-down test test-kubernetes test-vm check bench clean

all: build

build:
	go build -ldflags "$(LDFLAGS)" -o bin/ ./meshd ./meshd/meshctl
	go build -ldflags "-s -w" -o bin/mesh ./cni-plugin
	go build -ldflags "-s -w" -o bin/ ./meshd/meshd-wireguard

# The image is named IMAGE; a registry of yours goes here and into the overlay.
IMAGE := meshd.dev/meshd:dev
image: build
	env -u GOARCH go run ./manifests/image -bin bin -o bin/meshd-image.tar -name $(IMAGE) $(if $(GOARCH),-arch $(GOARCH))

# --- what the host must have -------------------------------------------------

PACKAGES := containerd runc nftables iproute2 wireguard-tools tcpdump strace procps kmod \
	conntrack containernetworking-plugins iputils-ping util-linux ca-certificates

# A containerd of another source (containerd.io) is as good; Debian's would push it out.
deps:
	@missing=(); for p in $(PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' && continue; \
		case $$p in containerd|runc) command -v $$p >/dev/null && continue;; esac; \
		missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then \
		echo "installing $${missing[*]}"; export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q </dev/null; apt-get install -y -q --no-install-recommends "$${missing[@]}" </dev/null; fi

# --- the demo ----------------------------------------------------------------

demo: deps build
	go build -o bin/demo ./test/demo
	bin/demo -bin bin $(if $(KEEP),-keep)

demo-down:
	go build -o bin/demo ./test/demo
	bin/demo down

# --- tests -------------------------------------------------------------------

# Whole stories run alone, after everything else.
STORIES := ./test/scenario/... ./test/host
# test/bench measures (make bench); test/vm boots a guest (make test-vm).
TESTED = $$(go list ./... | grep -v -e /test/scenario -e /test/host -e /test/bench -e /test/vm -e /test/kubernetes)

# Debian's kubectl, unpacked and not installed: the host may have one of its own.
bin/kubectl-debian:
	@mkdir -p bin && t=$$(mktemp -d) && trap "rm -rf $$t" EXIT && chmod 755 $$t && cd $$t && \
	{ apt-get download -q kubernetes-client || { apt-get update -q && apt-get download -q kubernetes-client; }; } </dev/null && \
	dpkg -x kubernetes-client_*.deb . && cp usr/bin/kubectl $(CURDIR)/$@

# Network managers and firewalls of a Debian, with what they need and this host
# has not, unpacked and not installed: nothing of them starts here. test/host
# lays them over the programs of its machines.
MANAGERS := systemd udev dbus network-manager firewalld iptables
bin/managers/done: Makefile
	@echo "unpacking $(MANAGERS)"; rm -rf bin/managers && mkdir -p bin/managers/{etc,usr/{bin,sbin,lib}} && ln -s usr/bin usr/sbin usr/lib bin/managers && \
	t=$$(mktemp -d) && trap "rm -rf $$t" EXIT && chmod 755 $$t && mkdir $$t/partial && \
	get() { apt-get install -q -y -d --reinstall --no-install-recommends -o APT::Sandbox::User=root -o Dir::Cache::archives=$$t $(MANAGERS); } && \
	{ get || { apt-get update -q && get; }; } </dev/null >$$t/log 2>&1 || { cat $$t/log; exit 1; }; \
	for deb in $$t/*.deb; do dpkg-deb --fsys-tarfile $$deb | tar -x --keep-directory-symlink -C bin/managers; done
	@touch $@

# Programs of Kubernetes and etcd, as upstream has them, out of the modules in
# go.mod: kubectl for tests on a host that has none, the rest for test/kubernetes.
UPSTREAM := kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy
bin/tools/kubectl $(addprefix bin/tools/,$(UPSTREAM)): bin/tools/%: go.mod
	go build -ldflags "-s -w -X $(K8S_VERSION).gitVersion=$(KUBERNETES)" -o $@ k8s.io/kubernetes/cmd/$*
bin/tools/etcd: go.mod
	go build -ldflags "-s -w" -o $@ go.etcd.io/etcd/server/v3

TOOLS := $(addprefix bin/tools/,kubectl etcd $(UPSTREAM))

# test/tally fails on a failed test and on a skipped one: here nothing may be missing.
# Vet is left to make check, which does more of it.
test: deps build image bin/kubectl-debian bin/managers/done $(TOOLS)
	go build -o bin/tally ./test/tally
	PATH="$$PATH:$(CURDIR)/bin/tools" go test -vet=off -p 2 -timeout 15m -json $(TESTED) 2>&1 | bin/tally
	go test -vet=off -p 1 -timeout 30m -json $(STORIES) 2>&1 | bin/tally
	go test -vet=off -timeout 30m -json -run '^TestBesideKubeProxy$$' ./test/kubernetes 2>&1 | bin/tally

# All stories of a real Kubernetes of three machines, with the image and the
# manifests as its network; make test tells the longest. TEST=NAME is one of
# them. The first run compiles its programs. A cluster that fails leaves its
# logs in bin/logs.
test-kubernetes: deps image $(TOOLS)
	go build -o bin/tally ./test/tally
	go test -vet=off -count=1 -timeout 30m -json $(if $(TEST),-run '^$(TEST)$$') ./test/kubernetes 2>&1 | bin/tally -steps

# The datapath's tests on a kernel that has WireGuard, in two emulated guests:
# minutes, and packages of 100 MB on the first run. Then the same tests here, and
# which ran on one of the two alone. TEST=NAME is some of them; TEST=core, as in
# .ci/run, is all but the changes of keys.
VM_PACKAGES := qemu-system-x86 nftables iptables iproute2 iputils-ping wireguard-tools conntrack
KERNEL_DIR := /var/cache/meshd
test-vm: deps
	@missing=(); for p in $(VM_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	[ $${#missing[@]} -eq 0 ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$${missing[@]}"; } </dev/null
	@mkdir -p $(KERNEL_DIR) && chmod 755 $(KERNEL_DIR) && cd $(KERNEL_DIR) && ls linux-image-[0-9]*-cloud-amd64_*.deb >/dev/null 2>&1 || \
	{ cd $(KERNEL_DIR) && get() { apt-get download -q $$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p'); }; \
	get || { apt-get update -q && get; }; } </dev/null
	go build -o bin/tally ./test/tally
	PATH="$$PATH:$(CURDIR)/bin/tools" MESHD_VM_TEST='$(TEST)' go test -vet=off -count=1 -timeout 60m -json ./test/vm 2>&1 | bin/tally -steps

check:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "gofmt -w $$unformatted"; exit 1; }
	go vet ./...
	go test -vet=off -count=1 ./test/arch
	@go mod tidy -diff >/dev/null || { echo "go.mod is not tidy: run go mod tidy"; exit 1; }

# What the tunnel is compared with: both WireGuards out of our own go.mod; Nebula
# by itself, since it wants other versions of what we have in there.
NEBULA := github.com/slackhq/nebula
NEBULA_VERSION := v1.10.3
bin/tools/wireguard-official: go.mod
	go build -o $@ golang.zx2c4.com/wireguard
bin/tools/wireguard-tailscale: go.mod
	go build -o $@ github.com/tailscale/wireguard-go
bin/tools/nebula: Makefile
	GOBIN=$(CURDIR)/bin/tools go install $(NEBULA)/cmd/nebula@$(NEBULA_VERSION) $(NEBULA)/cmd/nebula-cert@$(NEBULA_VERSION)
	touch $@

BENCH_PACKAGES := iperf3 ethtool
bench: deps build bin/tools/wireguard-official bin/tools/wireguard-tailscale bin/tools/nebula
	@missing=(); for p in $(BENCH_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	[ $${#missing[@]} -eq 0 ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$${missing[@]}"; } </dev/null
	go build -o bin/bench ./test/bench
	bin/bench -bin bin $(if $(ONLY),-only $(ONLY))

clean:
	rm -rf bin
