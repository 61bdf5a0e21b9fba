package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestNode is the life of one machine: first every kind of pod at once, then
// its parts go away one after the other.
func TestNode(t *testing.T) {
	l := newLab(t)
	conflist := filepath.Join(l.dir, "net.d/10-tiny.conflist")
	if err := os.Remove(conflist); err != nil {
		t.Fatal(err)
	}
	stop := l.startAgent()
	l.until("the node is there", func() bool {
		n, err := l.admin.CoreV1().Nodes().Get(context.Background(), nodeName, metav1.GetOptions{})
		return err == nil && len(n.Status.Conditions) > 0
	})
	if l.nodeReady() {
		t.Error("the node says it is ready without a network")
	}
	t.Run("pods", func(t *testing.T) { everyPod(t, l.in(t)) })
	t.Run("away", func(t *testing.T) { away(t, l.in(t), stop) })
}

func everyPod(t *testing.T, l *lab) {
	stories := []struct {
		name string
		pod  func(*lab) *v1.Pod
		then func(*testing.T, *lab)
	}{
		{"goodbye", goodbyePod, goodbyeStory},
		{"restart", restartPod, restartStory},
		{"shim", shimPod, shimStory},
		{"probes", probesPod, probesStory},
		{"init", initPod, initStory},
		{"volumes", volumesPod, volumesStory},
		{"doors", doorsPod, doorsStory},
		{"limits", limitsPod, limitsStory},
		{"ends", endsPod, endsStory},
		{"deadline", deadlinePod, deadlineStory},
		{"hungry", hungryPod, hungryStory},
		{"refused", refusedPod, refusedStory},
		{"pull", pullPod, pullStory},
	}
	for _, story := range stories {
		p := story.pod(l)
		p.Name = story.name
		l.create(p)
	}
	l.network() // now that they have waited for it
	for _, story := range stories {
		t.Run(story.name, func(t *testing.T) {
			l := l.in(t)
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("%s: %+v", story.name, l.get(story.name).Status)
				}
			})
			story.then(t, l)
		})
	}
}

func restartPod(*lab) *v1.Pod { return pod("", container("main", "say", "hello", ";", "wait")) }

// A container that is killed runs again at once; killed again it waits and says
// so; its logs, this one's and the last one's, can be read.
func restartStory(t *testing.T, l *lab) {
	l.phase("restart", v1.PodRunning)
	first := l.status("restart", "main")
	kill(t, l.pid("restart", "main"))
	l.until("it runs again", func() bool {
		s := l.status("restart", "main")
		return s.RestartCount == 1 && s.State.Running != nil && s.Ready
	})
	s := l.status("restart", "main")
	if last := s.LastTerminationState.Terminated; last == nil || last.ExitCode != 137 || last.ContainerID != first.ContainerID {
		t.Errorf("last termination is %+v", last)
	}
	kill(t, l.pid("restart", "main"))
	l.until("it waits", func() bool {
		w := l.status("restart", "main").State.Waiting
		return w != nil && w.Reason == "CrashLoopBackOff"
	})
	l.until("the events tell of it", func() bool {
		return containsAll(l.events("restart"), "Pulled", "Created", "Started", "BackOff")
	})
	logs, err := l.admin.CoreV1().Pods("default").GetLogs("restart", &v1.PodLogOptions{Previous: true}).DoRaw(context.Background())
	if err != nil || string(logs) != "hello\n" {
		t.Errorf("previous log %q, %v", logs, err)
	}
}

func shimPod(*lab) *v1.Pod { return pod("", container("main", "wait")) }

// When the process that holds the sandbox is killed, there is a new sandbox
// and the container runs in it, one restart older.
func shimStory(t *testing.T, l *lab) {
	before := l.phase("shim", v1.PodRunning)
	id := bareID(l.status("shim", "main").ContainerID)
	sandbox := l.sandboxOf("shim")
	shims := l.processes("containerd-shim-runc-v2\x00-namespace\x00k8s.io\x00-id\x00" + sandbox)
	if len(shims) != 1 {
		t.Fatalf("sandbox %s has shims %v", sandbox, shims)
	}
	old := l.pid("shim", "main")
	kill(t, shims[0])
	l.until("it runs in a new sandbox", func() bool {
		s := l.status("shim", "main")
		return s.State.Running != nil && s.RestartCount == 1 && bareID(s.ContainerID) != id && l.sandboxOf("shim") != sandbox
	})
	l.until("the old process has ended", func() bool { return ended(old) })
	if after := l.get("shim"); after.UID != before.UID {
		t.Error("it is another pod")
	}
	l.until("the event tells of it", func() bool { return containsAll(l.events("shim"), "SandboxChanged") })
}

func initPod(*lab) *v1.Pod {
	always := v1.ContainerRestartPolicyAlways
	work := v1.VolumeMount{Name: "work", MountPath: "/work"}
	with := func(c v1.Container) v1.Container { c.VolumeMounts = append(c.VolumeMounts, work); return c }
	side := with(container("side", "need", "/work/one", ";", "write", "/work/side", "x", ";", "wait"))
	side.RestartPolicy = &always
	p := pod("", with(container("main", "need", "/work/two", ";", "say", "done", ";", "sleep", "300")))
	p.Spec.InitContainers = []v1.Container{
		with(container("one", "write", "/work/one", "1")), side,
		with(container("two", "need", "/work/one", ";", "write", "/work/two", "2")),
	}
	p.Spec.Volumes = []v1.Volume{{Name: "work", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}}
	p.Spec.RestartPolicy = v1.RestartPolicyNever
	return p
}

// Init containers run in order, a sidecar beside them; the pod has succeeded
// when its main container has, and the sidecar is ended.
func initStory(t *testing.T, l *lab) {
	l.phase("init", v1.PodSucceeded)
	p := l.get("init")
	var codes []string
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.State.Terminated == nil {
			t.Fatalf("%s has not ended: %+v", s.Name, s.State)
		}
		codes = append(codes, fmt.Sprintf("%s %d %s #%d", s.Name, s.State.Terminated.ExitCode, s.State.Terminated.Reason, s.RestartCount))
	}
	if got, want := strings.Join(codes, ", "), "one 0 Completed #0, side 0 Completed #0, two 0 Completed #0, main 0 Completed #0"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func volumesPod(l *lab) *v1.Pod {
	ctx := context.Background()
	_, err := l.admin.CoreV1().ConfigMaps("default").Create(ctx, &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm"}, Data: map[string]string{"key": "old", "port": "8080"}}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	_, err = l.admin.CoreV1().Secrets("default").Create(ctx, &v1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "sec"}, Data: map[string][]byte{"pass": []byte("hidden")}}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	host := filepath.Join(l.dir, "onhost")
	create := v1.HostPathDirectoryOrCreate
	hour, mode := int64(3600), int32(0o400)
	c := container("main", "http", "$(PORT)")
	c.Env = []v1.EnvVar{
		{Name: "PORT", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}, Key: "port"}}},
		{Name: "PASS", ValueFrom: &v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{LocalObjectReference: v1.LocalObjectReference{Name: "sec"}, Key: "pass"}}},
		{Name: "IP", ValueFrom: &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
		{Name: "BOTH", Value: "$(PASS)@$(IP) $$(PASS) $(NONE)"},
	}
	c.EnvFrom = []v1.EnvFromSource{{Prefix: "CM_", ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}}
	c.VolumeMounts = []v1.VolumeMount{
		{Name: "cm", MountPath: "/cm"}, {Name: "sec", MountPath: "/sec"}, {Name: "proj", MountPath: "/proj"},
		{Name: "mem", MountPath: "/mem"}, {Name: "host", MountPath: "/host"}, {Name: "host", MountPath: "/sub", SubPath: "a/b"},
	}
	p := pod("", c)
	p.Labels = map[string]string{"colour": "green"}
	p.Spec.HostAliases = []v1.HostAlias{{IP: "10.1.2.3", Hostnames: []string{"alias.test"}}}
	p.Spec.Subdomain = "sub"
	p.Spec.ServiceAccountName = "default"
	p.Spec.Volumes = []v1.Volume{
		{Name: "cm", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}},
		{Name: "sec", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "sec", DefaultMode: &mode}}},
		{Name: "mem", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: v1.StorageMediumMemory}}},
		{Name: "host", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: host, Type: &create}}},
		{Name: "proj", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
			{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: &hour}},
			{ConfigMap: &v1.ConfigMapProjection{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}, Items: []v1.KeyToPath{{Key: "key", Path: "deep/key"}}}},
			{DownwardAPI: &v1.DownwardAPIProjection{Items: []v1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &v1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}},
		}}}},
	}
	return p
}

// Everything a pod can mount or read of the API is there, and what changes in
// the API changes in the pod.
func volumesStory(t *testing.T, l *lab) {
	p := l.phase("volumes", v1.PodRunning)
	base := "http://" + p.Status.PodIP + ":8080"
	read := func(path string) string { return l.fetch(base + "/file" + path) }
	for path, want := range map[string]string{"/cm/key": "old", "/sec/pass": "hidden", "/proj/deep/key": "old", "/proj/labels": `colour="green"`} {
		if got := read(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if token := read("/proj/token"); strings.Count(token, ".") != 2 {
		t.Errorf("token is %q", token)
	}
	for path, want := range map[string][]string{
		"/etc/resolv.conf": {"nameserver 10.99.0.1", "search default.svc.cluster.local svc.cluster.local cluster.local", "ndots:5"},
		"/etc/hosts":       {p.Status.PodIP + "\tvolumes.sub.default.svc.cluster.local\tvolumes", "10.1.2.3\talias.test"},
	} {
		for _, w := range want {
			if got := read(path); !strings.Contains(got, w) {
				t.Errorf("%s lacks %q:\n%s", path, w, got)
			}
		}
	}
	env := l.fetch(base + "/env")
	for _, want := range []string{"PASS=hidden\n", "BOTH=hidden@" + p.Status.PodIP + " $(PASS) $(NONE)\n", "CM_key=old\n", "HOSTNAME=volumes\n"} {
		if !strings.Contains(env, want) {
			t.Errorf("environment lacks %q:\n%s", want, env)
		}
	}
	if err := os.WriteFile(filepath.Join(l.dir, "onhost/a/b/file"), []byte("below"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := read("/sub/file"); got != "below" {
		t.Errorf("subPath shows %q", got)
	}
	cms := l.admin.CoreV1().ConfigMaps("default")
	if _, err := cms.Update(context.Background(), &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm"}, Data: map[string]string{"key": "new", "port": "8080"}}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	l.until("the files follow", func() bool { return read("/cm/key") == "new" && read("/proj/deep/key") == "new" })
	if s := l.status("volumes", "main"); s.RestartCount != 0 {
		t.Errorf("it was restarted %d times", s.RestartCount)
	}
}

func probesPod(*lab) *v1.Pod {
	c := container("main", "http", "8080")
	health := v1.ProbeHandler{HTTPGet: &v1.HTTPGetAction{Path: "/health", Port: intstr.FromString("web")}}
	c.Ports = []v1.ContainerPort{{Name: "web", ContainerPort: 8080}}
	c.StartupProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt32(8080)}}, PeriodSeconds: 1, FailureThreshold: 30}
	c.ReadinessProbe = &v1.Probe{ProbeHandler: health, PeriodSeconds: 1, FailureThreshold: 1}
	c.LivenessProbe = &v1.Probe{ProbeHandler: health, PeriodSeconds: 1, FailureThreshold: 3}
	cmd := container("cmd", "wait")
	cmd.ReadinessProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"/busy", "need", "/tmp/ok"}}}, PeriodSeconds: 1, TimeoutSeconds: 5}
	return pod("", c, cmd)
}

// Readiness follows the probes, and a container that fails its liveness probe
// is restarted.
func probesStory(t *testing.T, l *lab) {
	l.until("the web server is ready, and the pod is not", func() bool {
		return l.status("probes", "main").Ready && !l.ready("probes")
	})
	p := l.get("probes")
	l.exec(p, "cmd", "/busy", "write", "/tmp/ok", "1")
	l.until("the pod is ready", func() bool { return l.ready("probes") })
	l.exec(p, "main", "/busy", "write", "/tmp/sick", "1")
	l.until("it is not", func() bool { return !l.ready("probes") })
	l.until("it was restarted and is ready", func() bool {
		return l.status("probes", "main").RestartCount == 1 && l.ready("probes")
	})
	l.until("the events tell of it", func() bool { return containsAll(l.events("probes"), "Unhealthy", "Killing") })
}

func endsPod(*lab) *v1.Pod {
	c := container("main", "write", "/dev/termination-log", "last words", ";", "exit", "3")
	p := pod("", c)
	p.Spec.RestartPolicy = v1.RestartPolicyNever
	return p
}

// A pod that fails for good says how, and its sandbox is given back.
func endsStory(t *testing.T, l *lab) {
	l.phase("ends", v1.PodFailed)
	end := l.status("ends", "main").State.Terminated
	if end == nil || end.ExitCode != 3 || end.Message != "last words" || end.Reason != "Error" {
		t.Errorf("it ended as %+v", end)
	}
	l.until("its sandbox is stopped", func() bool {
		pods, err := l.rt.List(context.Background())
		p := pods[l.get("ends").UID]
		return err == nil && p != nil && !p.Sandboxes[0].Ready
	})
}

func refusedPod(*lab) *v1.Pod {
	p := pod("", container("main", "wait"))
	p.Spec.Volumes = []v1.Volume{{Name: "net", VolumeSource: v1.VolumeSource{NFS: &v1.NFSVolumeSource{Server: "x", Path: "/"}}}}
	p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "net", MountPath: "/net"}}
	return p
}

// What is not supported is said, by the name of the field.
func refusedStory(t *testing.T, l *lab) {
	l.until("it is refused", func() bool {
		w := l.status("refused", "main").State.Waiting
		return w != nil && w.Reason == "Unsupported" && strings.Contains(w.Message, "spec.volumes[net]")
	})
	l.until("an event says so", func() bool { return containsAll(l.events("refused"), "Unsupported") })
}

func pullPod(*lab) *v1.Pod {
	c := container("main", "wait")
	c.Image = "127.0.0.1:1/none:1"
	return pod("", c)
}

func pullStory(t *testing.T, l *lab) {
	l.until("the pull has failed", func() bool {
		w := l.status("pull", "main").State.Waiting
		return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff") && strings.Contains(w.Message, "127.0.0.1:1/none:1")
	})
}

func deadlinePod(*lab) *v1.Pod {
	p := pod("", container("main", "wait"))
	seconds := int64(1)
	p.Spec.ActiveDeadlineSeconds = &seconds
	return p
}

func deadlineStory(t *testing.T, l *lab) {
	p := l.phase("deadline", v1.PodFailed)
	if p.Status.Reason != "DeadlineExceeded" {
		t.Errorf("reason is %q", p.Status.Reason)
	}
}

func hungryPod(*lab) *v1.Pod {
	small := resource.MustParse("4Ki")
	c := container("main", "write", "/v/a", strings.Repeat("x", 20<<10), ";", "wait")
	c.VolumeMounts = []v1.VolumeMount{{Name: "v", MountPath: "/v"}}
	p := pod("", c)
	p.Spec.Volumes = []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{SizeLimit: &small}}}}
	return p
}

// A pod that takes more of the disk than it asked for is ended.
func hungryStory(t *testing.T, l *lab) {
	p := l.phase("hungry", v1.PodFailed)
	if p.Status.Reason != "Evicted" || !strings.Contains(p.Status.Message, "EmptyDir") {
		t.Errorf("it ended with %s: %s", p.Status.Reason, p.Status.Message)
	}
}

func limitsPod(*lab) *v1.Pod {
	c := container("main", "http", "8080")
	c.Resources = v1.ResourceRequirements{
		Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("100m"), v1.ResourceMemory: resource.MustParse("32Mi")},
		Limits:   v1.ResourceList{v1.ResourceCPU: resource.MustParse("500m"), v1.ResourceMemory: resource.MustParse("64Mi")},
	}
	user, yes, no := int64(1234), true, false
	c.SecurityContext = &v1.SecurityContext{RunAsUser: &user, RunAsGroup: &user, ReadOnlyRootFilesystem: &yes, AllowPrivilegeEscalation: &no,
		Capabilities:   &v1.Capabilities{Drop: []v1.Capability{"ALL"}},
		SeccompProfile: &v1.SeccompProfile{Type: v1.SeccompProfileTypeRuntimeDefault}}
	p := pod("", c)
	group := int64(4321)
	p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
	p.Spec.Volumes = []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}}
	p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "v", MountPath: "/v"}}
	return p
}

// Limits reach the cgroup, the security context the process.
func limitsStory(t *testing.T, l *lab) {
	p := l.phase("limits", v1.PodRunning)
	id := bareID(l.status("limits", "main").ContainerID)
	spec := run(t, "ctr", "-a", l.cri, "-n", "k8s.io", "containers", "info", "--spec", id)
	for _, want := range []string{`"limit": 67108864`, `"quota": 50000`, `"shares": 102`, `"uid": 1234`, `"gid": 1234`, `"noNewPrivileges": true`, `"readonly": true`, `"defaultAction"`} {
		if !strings.Contains(spec, want) {
			t.Errorf("the container's specification lacks %s", want)
		}
	}
	status := l.fetch("http://" + p.Status.PodIP + ":8080/file/proc/self/status")
	for _, want := range []string{"Uid:\t1234\t", "Gid:\t1234\t", "Groups:\t1234 4321", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("the process lacks %q:\n%s", want, status)
		}
	}
	st, err := os.Stat(filepath.Join(l.dir, "agent/volumes", string(p.UID), "volumes/v"))
	if err != nil || st.Sys().(*syscall.Stat_t).Gid != 4321 || st.Mode()&os.ModeSetgid == 0 {
		t.Errorf("the volume is %v, %v", st, err)
	}
	if p.Status.QOSClass != v1.PodQOSBurstable {
		t.Errorf("class is %s", p.Status.QOSClass)
	}
}

func goodbyePod(l *lab) *v1.Pod {
	host := filepath.Join(l.dir, "bye")
	create := v1.HostPathDirectoryOrCreate
	c := container("main", "wait", ";", "write", "/bye/term", "x")
	c.Lifecycle = &v1.Lifecycle{PreStop: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"/busy", "write", "/bye/prestop", "x"}}},
		PostStart: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"/busy", "write", "/bye/poststart", "x"}}}}
	c.VolumeMounts = []v1.VolumeMount{{Name: "bye", MountPath: "/bye"}}
	p := pod("", c, container("deaf", "deaf"))
	p.Spec.Volumes = []v1.Volume{{Name: "bye", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: host, Type: &create}}},
		{Name: "mem", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: v1.StorageMediumMemory}}}}
	return p
}

// A pod that is deleted is asked first, then made to; nothing is left of it.
func goodbyeStory(t *testing.T, l *lab) {
	p := l.phase("goodbye", v1.PodRunning)
	l.until("the hook has run", func() bool { return exists(filepath.Join(l.dir, "bye/poststart")) })
	if err := l.admin.CoreV1().Pods("default").Delete(context.Background(), "goodbye", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	l.until("the API has it no more", func() bool { return l.get("goodbye").Name == "" })
	for _, f := range []string{"prestop", "term"} {
		if !exists(filepath.Join(l.dir, "bye", f)) {
			t.Errorf("%s was not done", f)
		}
	}
	for _, left := range []string{"agent/volumes/" + string(p.UID), "agent/pods/" + string(p.UID) + ".json", "logs/default_goodbye_" + string(p.UID)} {
		if exists(filepath.Join(l.dir, left)) {
			t.Errorf("%s is left", left)
		}
	}
	pods, err := l.rt.List(context.Background())
	if err != nil || pods[p.UID] != nil {
		t.Errorf("the runtime has %+v, %v", pods[p.UID], err)
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func containsAll(have []string, want ...string) bool {
	return !slices.ContainsFunc(want, func(w string) bool { return !slices.Contains(have, w) })
}
