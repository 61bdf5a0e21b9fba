package shortcut

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Names of what we have in the kernel, as bpftool(8) lists them.
const (
	programName = "meshd_shortcut"
	pods4Name   = "meshd_pods4"
	pods6Name   = "meshd_pods6"
	takenName   = "meshd_taken"
)

// maxPods bounds each map; memory is taken as pods come.
const maxPods = 16384

// loaded is the program in the kernel, with its maps. It lives on without us
// for as long as a link has it.
type loaded struct {
	program             *ebpf.Program
	id                  ebpf.ProgramID
	pods4, pods6, taken *ebpf.Map
}

// load gives the kernel a new program with empty maps.
func load() (*loaded, error) {
	l, done := &loaded{}, false
	defer func() {
		if !done {
			l.close()
		}
	}()
	c, module, err := findConntrack()
	if err != nil {
		return nil, err
	}
	defer module.Close()
	for _, m := range []struct {
		to   **ebpf.Map
		spec ebpf.MapSpec
	}{
		{&l.pods4, ebpf.MapSpec{Name: pods4Name, Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: maxPods, Flags: unix.BPF_F_NO_PREALLOC}},
		{&l.pods6, ebpf.MapSpec{Name: pods6Name, Type: ebpf.Hash, KeySize: 16, ValueSize: 4, MaxEntries: maxPods, Flags: unix.BPF_F_NO_PREALLOC}},
		{&l.taken, ebpf.MapSpec{Name: takenName, Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1}},
	} {
		if *m.to, err = ebpf.NewMap(&m.spec); err != nil {
			return nil, fmt.Errorf("map %s: %w", m.spec.Name, err)
		}
	}
	p := parts{pods4: l.pods4.FD(), pods6: l.pods6.FD(), taken: l.taken.FD(), conntrack: c}
	if l.program, err = loadProgram(p, module); err != nil {
		return nil, err
	}
	info, err := l.program.Info()
	if err != nil {
		return nil, err
	}
	l.id, _ = info.ID()
	done = true
	return l, nil
}

func (l *loaded) close() {
	_ = l.program.Close() // all are fine with nil
	_ = l.pods4.Close()
	_ = l.pods6.Close()
	_ = l.taken.Close()
}

// packets that were taken so far.
func (l *loaded) packets() (n uint64) {
	var perCPU []uint64
	if l.taken.Lookup(uint32(0), &perCPU) == nil {
		for _, p := range perCPU {
			n += p
		}
	}
	return n
}

// loadAttr is the part of union bpf_attr (linux/bpf.h) that BPF_PROG_LOAD
// reads. The library has no way to call a kernel function from a program that
// was not compiled by clang, so it is done here.
type loadAttr struct {
	progType, instructions uint32
	code, license          uint64
	logLevel, logSize      uint32
	log                    uint64
	_, _                   uint32
	name                   [unix.BPF_OBJ_NAME_LEN]byte
	_, attachType          uint32
	_                      [6]uint64
	descriptors            uint64
}

// licence is what the kernel lends its functions to. The program, and nothing
// else here, may be used under these terms as well.
var licence = []byte("Dual MIT/GPL\x00")

// loadProgram has the kernel verify and take the program. module describes
// conntrack, where that is a module.
func loadProgram(p parts, module *btf.Handle) (*ebpf.Program, error) {
	var code bytes.Buffer
	if err := program(p).Marshal(&code, nativeOrder()); err != nil {
		return nil, fmt.Errorf("assemble: %w", err)
	}
	var pin runtime.Pinner // what the kernel is given the addresses of as numbers
	defer pin.Unpin()
	descriptors := []int32{0, -1} // kfunc.offset is an index here; 0 is the kernel itself
	if module != nil {
		descriptors[1] = int32(module.FD())
	}
	try := func(log []byte) (int, unix.Errno) {
		attr := loadAttr{
			progType: unix.BPF_PROG_TYPE_SCHED_CLS, attachType: unix.BPF_TCX_INGRESS,
			instructions: uint32(code.Len() / 8), code: pinned(&pin, code.Bytes()), license: pinned(&pin, licence),
			descriptors: pinned(&pin, descriptors),
		}
		copy(attr.name[:], programName)
		if log != nil {
			attr.logLevel, attr.logSize, attr.log = 1, uint32(len(log)), pinned(&pin, log)
		}
		fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		return int(fd), errno
	}
	fd, errno := try(nil)
	if errno == 0 {
		return ebpf.NewProgramFromFD(fd)
	}
	if errno == unix.EPERM {
		return nil, errno
	}
	log := make([]byte, 1<<20)
	if fd, again := try(log); again == 0 {
		return ebpf.NewProgramFromFD(fd)
	}
	return nil, fmt.Errorf("the kernel refuses the program: %w: %s", errno, lastLines(log, 3))
}

// pinned is the address of s, which stays where it is until pin is unpinned.
func pinned[T any](pin *runtime.Pinner, s []T) uint64 {
	first := unsafe.SliceData(s)
	pin.Pin(first)
	return uint64(uintptr(unsafe.Pointer(first)))
}

// lastLines of the verifier's log are where it says what it does not like.
func lastLines(log []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimRight(log, "\x00\n"), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte(" / "))
}

// nativeOrder as the assembler wants it said.
func nativeOrder() binary.ByteOrder {
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		return binary.BigEndian
	}
	return binary.LittleEndian
}
