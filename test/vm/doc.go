// Package vm runs tests on another kernel: a guest of QEMU, emulated in
// software, that boots Debian's cloud kernel with an initramfs of a static
// program of ours, test binaries, and the tools of this host they call. The
// guest's kernel has WireGuard; so the tests of the datapath, which everywhere
// else meet the userspace device, meet the kernel's here. It is the same table
// of tests: the environment variable MESHD_TEST_BACKEND=kernel tells the few
// that differ which device must be there, and that nothing else will do. In the
// end the names of the tests that ran in a guest are held against those of
// this machine; the few that run on one of them alone stand with their reasons
// in hereOnly.
//
// Time in a guest is counted by its instructions and not by a clock: see clock.
// So it does not matter how slow or how busy this machine is, and two guests run
// beside each other.
//
// A guest has no disk, no network card and no way to this host but two serial
// lines: the first is its console, kept for when it breaks, the second carries
// what the tests print. It ends with its tests, with its time limit, or with
// the program that started it; what it needs lies in one temporary folder.
//
// Needed: qemu-system-x86_64, dpkg-deb, ldd, the tools named in Tools, and a
// kernel. FindKernel takes the newest linux-image-*-cloud-amd64_*.deb of the
// folders KernelFolders, or the file that MESHD_VM_KERNEL names; nothing is
// installed, the package is only read.
//
// Reading order: guest.go (a guest's life), kernel.go (image and modules of a
// Debian package), initramfs.go (the root file system), init (the first
// process of the guest), verdict.go (what ran where), vm_test.go (which tests).
package vm
