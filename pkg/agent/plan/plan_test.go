package plan

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// A world is written as words, one thing each:
//
//	pod:        policy=Never init=a,b,side~ (~ is a sidecar) app=x,y
//	            deleted gone deadline=10 phase=Failed unsupported grace=5
//	sandboxes:  s0 s1! (! is not ready)        down=s0
//	containers: x#0@s0:run  x#0@s0:exit=1,ran=5s,ago=2s,waited=10s  :created :unknown :old
//	probes:     ready=x unstarted=x sick=x
//	            hold=9s (until then; alone: until heard) nonetwork
//	rest:       busy=start/x failed=start/x,ErrImagePull,2,ago=1s novolumes volumesgone
func parse(t *testing.T, text string) Input {
	t.Helper()
	in := Input{
		Pod: &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u"},
			Spec: v1.PodSpec{RestartPolicy: v1.RestartPolicyAlways}},
		Health: map[string]Health{}, Failures: map[string]Failure{}, Busy: map[string]bool{}, Down: map[string]bool{},
		VolumesReady: true, StartTime: noon.Add(-time.Minute), Now: noon,
		Hash: func(c *v1.Container) string { return c.Name },
	}
	for word := range strings.FieldsSeq(text) {
		parseWord(t, &in, word)
	}
	for i := range in.Observed.Containers {
		c := &in.Observed.Containers[i]
		if _, ok := in.Health[c.ID]; !ok && c.State == Running {
			in.Health[c.ID] = Health{Started: true, Ready: true}
		}
	}
	in.Observed.Sort()
	return in
}

func parseWord(t *testing.T, in *Input, word string) {
	t.Helper()
	key, value, _ := strings.Cut(word, "=")
	spec := &in.Pod.Spec
	number := func(s string) int64 {
		var n int64
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatalf("%s: %v", word, err)
		}
		return n
	}
	switch {
	case strings.Contains(word, "@"):
		in.Observed.Containers = append(in.Observed.Containers, parseContainer(t, word))
		return
	case key == "policy":
		spec.RestartPolicy = v1.RestartPolicy(value)
	case key == "init":
		for n := range strings.SplitSeq(value, ",") {
			c := v1.Container{Name: strings.TrimSuffix(n, "~")}
			if c.Name != n {
				always := v1.ContainerRestartPolicyAlways
				c.RestartPolicy = &always
			}
			spec.InitContainers = append(spec.InitContainers, c)
		}
	case key == "app":
		for n := range strings.SplitSeq(value, ",") {
			spec.Containers = append(spec.Containers, v1.Container{Name: n})
		}
	case key == "grace":
		n := number(value)
		spec.TerminationGracePeriodSeconds = &n
	case key == "deleted":
		at := metav1.NewTime(noon)
		in.Pod.DeletionTimestamp = &at
	case key == "gone":
		in.Gone = true
	case key == "deadline":
		n := number(value)
		spec.ActiveDeadlineSeconds = &n
	case key == "phase":
		in.Pod.Status.Phase = v1.PodPhase(value)
	case key == "nonetwork":
		in.NoNetwork = "no conflist"
	case key == "hold":
		in.Hold = "the API"
		if value != "" {
			in.HoldUntil = noon.Add(duration(t, value))
		}
	case key == "hostnetwork":
		spec.HostNetwork = true
	case key == "evicted":
		in.Evicted = "too big"
	case key == "unsupported":
		in.Unsupported = "spec.x: no"
	case key == "known":
		in.Pod.Status.ContainerStatuses = []v1.ContainerStatus{{Name: value, ContainerID: "containerd://z", RestartCount: 4}}
	case key == "down":
		in.Down[value] = true
	case key == "busy":
		in.Busy[value] = true
	case key == "novolumes":
		in.VolumesReady = false
	case key == "volumesgone":
		in.VolumesGone = true
	case key == "sick":
		in.Health[value] = Health{Started: true, Unhealthy: "Container failed liveness probe"}
	case key == "unstarted":
		in.Health[value] = Health{}
	case key == "failed":
		f := strings.Split(value, ",")
		in.Failures[f[0]] = Failure{Reason: f[1], Message: "no", Count: int(number(f[2])), At: noon.Add(-duration(t, f[3]))}
	case strings.HasPrefix(word, "s"):
		name := strings.TrimSuffix(word, "!")
		n := number(name[1:])
		in.Observed.Sandboxes = append(in.Observed.Sandboxes, Sandbox{ID: name, Attempt: uint32(n), Ready: name == word, Created: noon.Add(-time.Hour)})
	default:
		t.Fatalf("word %q is not understood", word)
	}
}

func parseContainer(t *testing.T, word string) Container {
	t.Helper()
	id, state, _ := strings.Cut(word, ":")
	run, sandbox, _ := strings.Cut(id, "@")
	name, attempt, _ := strings.Cut(run, "#")
	c := Container{ID: run, Name: name, SandboxID: sandbox, Hash: name, Created: noon.Add(-time.Hour)}
	if _, err := fmt.Sscan(attempt, &c.Attempt); err != nil {
		t.Fatalf("%s: %v", word, err)
	}
	ran, ago := time.Second, time.Duration(0)
	for part := range strings.SplitSeq(state, ",") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "run":
			c.State = Running
		case "old":
			c.State, c.Hash = Running, "other"
		case "created":
			c.State = Created
		case "unknown":
			c.State = Unknown
		case "exit":
			c.State = Exited
			if _, err := fmt.Sscan(value, &c.ExitCode); err != nil {
				t.Fatalf("%s: %v", word, err)
			}
		case "ran":
			ran = duration(t, value)
		case "ago":
			ago = duration(t, value)
		case "waited":
			c.Backoff = duration(t, value)
		default:
			t.Fatalf("state %q is not understood", part)
		}
	}
	c.Finished = noon.Add(-ago)
	c.Started = c.Finished.Add(-ran)
	return c
}

func duration(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(strings.TrimPrefix(s, "ago="))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// text of a plan: the operations, then what waits, when to wake, how it stands.
func text(p Plan) []string {
	var out []string
	for _, o := range p.Ops {
		out = append(out, o.String())
	}
	var waits []string
	for name, w := range p.Waiting {
		waits = append(waits, name+" waits: "+w.Reason)
	}
	slices.Sort(waits)
	out = append(out, waits...)
	if !p.Wake.IsZero() {
		out = append(out, "wake in "+p.Wake.Sub(noon).String())
	}
	if p.Failed != "" {
		out = append(out, "failed: "+p.Failed)
	}
	if p.Stopped {
		out = append(out, "stopped")
	}
	return out
}

func TestNext(t *testing.T) {
	for _, c := range []struct{ name, world, want string }{
		{"a new pod needs its volumes first", "app=x novolumes", "set up volumes; x waits: ContainerCreating"},
		{"then a sandbox", "app=x", "create sandbox #0; x waits: ContainerCreating"},
		{"not without a network", "app=x nonetwork", "x waits: ContainerCreating"},
		{"but the node's own will do", "app=x nonetwork hostnetwork", "create sandbox #0; x waits: ContainerCreating"},
		{"not while it is held", "app=x hold=9s", "x waits: ContainerCreating; wake in 9s"},
		{"for as long as it takes", "app=x hold", "x waits: ContainerCreating"},
		{"what is left of the old one goes meanwhile", "app=x hold s0! x#0@s0:exit=137", "stop sandbox s0; x waits: ContainerCreating"},
		{"what lives is not held", "app=x hold s0 x#0@s0:exit=1", "start container x #1 after 0s; x waits: ContainerCreating"},
		{"nor is an end", "deleted hold app=x s0 x#0@s0:exit=0", "stop sandbox s0"},
		{"then its containers", "app=x,y s0", "start container x #0 after 0s; start container y #0 after 0s; x waits: ContainerCreating; y waits: ContainerCreating"},
		{"nothing to do", "app=x s0 x#0@s0:run", ""},
		{"a start under way is not repeated", "app=x s0 busy=start/x", "x waits: ContainerCreating"},
		{"a sandbox under way is not repeated", "app=x busy=sandbox", "x waits: ContainerCreating"},
		{"adoption does not wait for volumes", "app=x s0 x#0@s0:run novolumes", "set up volumes"},
		{"nor does a restart happen without them", "app=x s0 x#0@s0:exit=1 novolumes", "set up volumes; x waits: ContainerCreating"},
		{"the API remembers restarts the runtime lost", "app=x s0 known=x", "start container x #5 after 0s; x waits: ContainerCreating"},

		{"the first crash restarts at once", "app=x s0 x#0@s0:exit=1", "start container x #1 after 0s; x waits: ContainerCreating"},
		{"the second waits 10 s", "app=x s0 x#1@s0:exit=1,ago=2s", "x waits: CrashLoopBackOff; wake in 8s"},
		{"and is restarted after them", "app=x s0 x#1@s0:exit=1,ago=10s", "start container x #2 after 10s; x waits: ContainerCreating"},
		{"the third waits 20 s", "app=x s0 x#2@s0:exit=1,waited=10s", "x waits: CrashLoopBackOff; wake in 20s"},
		{"never more than 5 minutes", "app=x s0 x#9@s0:exit=1,waited=300s", "x waits: CrashLoopBackOff; wake in 5m0s"},
		{"10 minutes of running are forgiveness", "app=x s0 x#9@s0:exit=1,waited=300s,ran=10m", "start container x #10 after 0s; x waits: ContainerCreating"},
		{"success restarts too under Always", "app=x s0 x#0@s0:exit=0", "start container x #1 after 0s; x waits: ContainerCreating"},
		{"one of two waits", "app=x,y s0 x#1@s0:exit=1 y#0@s0:run", "x waits: CrashLoopBackOff; wake in 10s"},

		{"OnFailure restarts failure", "policy=OnFailure app=x s0 x#0@s0:exit=1", "start container x #1 after 0s; x waits: ContainerCreating"},
		{"OnFailure leaves success", "policy=OnFailure app=x,y s0 x#0@s0:exit=0 y#0@s0:run", ""},
		{"a completed pod gives back its sandbox", "policy=OnFailure app=x s0 x#0@s0:exit=0", "stop sandbox s0"},
		{"once", "policy=OnFailure app=x s0! down=s0 x#0@s0:exit=0", "stopped"},
		{"Never leaves failure", "policy=Never app=x,y s0 x#0@s0:exit=1 y#0@s0:run", ""},
		{"a final phase is final", "phase=Succeeded app=x", "stopped"},
		{"whatever runs", "phase=Failed app=x s0 x#0@s0:run", "kill container x (x#0) within 30s: Pod has ended"},

		{"a pull that failed is retried later", "app=x s0 failed=start/x,ErrImagePull,2,ago=5s", "x waits: ImagePullBackOff; wake in 15s"},
		{"other failures sooner", "app=x s0 failed=start/x,CreateContainerConfigError,1,ago=400ms", "x waits: CreateContainerConfigError; wake in 100ms"},
		{"volumes that fail hold the sandbox", "app=x novolumes failed=volumes,FailedMount,1,ago=1ms", "x waits: ContainerCreating; wake in 499ms"},

		{"init containers go first, in order", "init=a,b app=x s0", "start container a #0 after 0s; a waits: ContainerCreating; b waits: PodInitializing; x waits: PodInitializing"},
		{"the next after success", "init=a,b app=x s0 a#0@s0:exit=0", "start container b #0 after 0s; b waits: ContainerCreating; x waits: PodInitializing"},
		{"while one runs the rest waits", "init=a app=x s0 a#0@s0:run", "x waits: PodInitializing"},
		{"one that fails is repeated", "init=a app=x s0 a#1@s0:exit=1", "a waits: CrashLoopBackOff; x waits: PodInitializing; wake in 10s"},
		{"but not under Never", "policy=Never init=a app=x s0 a#0@s0:exit=1", "stop sandbox s0"},
		{"after the last the app", "init=a app=x s0 a#0@s0:exit=0", "start container x #0 after 0s; x waits: PodInitializing"},
		{"they are not repeated while the app lives", "init=a app=x s0 x#0@s0:exit=1", "start container x #1 after 0s; x waits: PodInitializing"},
		{"a new sandbox repeats them at once", "init=a app=x s1 a#3@s0:exit=0,waited=40s x#0@s0:exit=137", "start container a #4 after 0s; a waits: ContainerCreating; x waits: PodInitializing"},
		{"a sidecar must have started", "init=side~ app=x s0 side#0@s0:run unstarted=side#0", "x waits: PodInitializing"},
		{"and is no obstacle then", "init=side~ app=x s0 side#0@s0:run", "start container x #0 after 0s; x waits: PodInitializing"},
		{"a sidecar is restarted beside the app", "init=side~ app=x s0 side#0@s0:exit=0 x#0@s0:run", "start container side #1 after 0s; side waits: ContainerCreating"},
		{"a job ends with its app, and its sidecar after", "policy=Never init=side~ app=x s0 side#0@s0:run x#0@s0:exit=0", "kill container side (side#0) within 30s: Pod has completed"},

		{"liveness kills", "app=x s0 x#0@s0:run sick=x#0", "kill container x (x#0) within 30s: Container failed liveness probe"},
		{"once", "app=x s0 x#0@s0:run sick=x#0 busy=kill/x#0", ""},
		{"a changed image kills", "app=x s0 x#0@s0:old", "kill container x (x#0) within 30s: Container x definition changed"},
		{"created and never started is made anew", "app=x s0 x#0@s0:created", "remove container x (x#0); x waits: ContainerCreating"},
		{"an unknown state is ended", "app=x s0 x#0@s0:unknown", "kill container x (x#0) within 30s: Container is in an unknown state"},
		{"two of one name: the older goes", "app=x s0 x#0@s0:run x#1@s0:run", "kill container x (x#0) within 2s: Container was replaced"},

		{"a dead sandbox: what runs in it is ended", "app=x s0! x#0@s0:run", "kill container x (x#0) within 2s: The pod's sandbox is gone; x waits: ContainerCreating"},
		{"its address is given back", "app=x s0! x#0@s0:exit=137", "stop sandbox s0; x waits: ContainerCreating"},
		{"and the next one made", "app=x s0! down=s0 x#0@s0:exit=137", "create sandbox #1; x waits: ContainerCreating"},
		{"restart counts go on in it", "app=x s1 s0! x#3@s0:exit=137,ran=10s", "start container x #4 after 0s; x waits: ContainerCreating"},
		{"a sandbox that dies again and again is no way around the wait", "app=x s1 s0! x#3@s0:exit=137", "x waits: CrashLoopBackOff; wake in 10s"},
		{"an old sandbox stays for its dead containers", "app=x s1 s0! x#3@s0:exit=137 x#4@s1:run", ""},
		{"and goes when they are gone", "app=x s1 s0! x#4@s1:run", "remove sandbox s0"},
		{"all but the last dead of a name are removed", "app=x s0 x#0@s0:exit=1 x#1@s0:exit=1 x#2@s0:run", "remove container x (x#0)"},

		{"deletion ends the app", "deleted grace=7 app=x s0 x#0@s0:run", "kill container x (x#0) within 7s: Stopping container"},
		{"before its sidecars", "deleted init=s1~,s2~ app=x s0 s1#0@s0:run s2#0@s0:run x#0@s0:run", "kill container x (x#0) within 30s: Stopping container"},
		{"the last sidecar first", "deleted init=s1~,s2~ app=x s0 s1#0@s0:run s2#0@s0:run x#0@s0:exit=0", "kill container s2 (s2#0) within 30s: Stopping container"},
		{"then the sandbox", "deleted app=x s0 x#0@s0:exit=0", "stop sandbox s0"},
		{"then it is removed", "deleted app=x s0! down=s0 x#0@s0:exit=0", "remove sandbox s0; stopped"},
		{"then the volumes", "deleted app=x", "tear down volumes; stopped"},
		{"then it is forgotten", "deleted app=x volumesgone", "forget pod; stopped"},
		{"a start under way is waited for", "deleted app=x s0 busy=start/x", ""},
		{"taken away by force", "gone app=x s0 x#0@s0:run", "kill container x (x#0) within 2s: Stopping container"},

		{"deadlines are kept", "deadline=90 app=x s0 x#0@s0:run", "wake in 30s"},
		{"and end the pod", "deadline=60 app=x s0 x#0@s0:run", "kill container x (x#0) within 30s: Pod ran longer than activeDeadlineSeconds; failed: DeadlineExceeded"},
		{"eviction ends it too", "evicted app=x s0 x#0@s0:run", "kill container x (x#0) within 30s: Pod is evicted; failed: Evicted"},
		{"what is not supported is said", "unsupported app=x novolumes", "x waits: Unsupported"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := strings.Join(text(Next(parse(t, c.world))), "; ")
			if got != c.want {
				t.Errorf("%s\n got: %s\nwant: %s", c.world, got, c.want)
			}
		})
	}
}

func TestNextBackoffIsTheDocumentedCurve(t *testing.T) {
	var waits []string
	wait := time.Duration(0)
	for attempt := range 9 {
		wait = NextBackoff(wait, time.Second, attempt)
		waits = append(waits, wait.String())
	}
	if got, want := strings.Join(waits, " "), "0s 10s 20s 40s 1m20s 2m40s 5m0s 5m0s 5m0s"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
