package registry

import (
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apiserver/pkg/registry/rest"
)

// images are the names and images of containers, as wide columns show them.
func images(spec corev1.PodSpec) (names, images string) {
	var n, i []string
	for _, c := range spec.Containers {
		n, i = append(n, c.Name), append(i, c.Image)
	}
	return strings.Join(n, ","), strings.Join(i, ",")
}

func appsKinds() []*Kind {
	all := []string{"all"}
	return []*Kind{
		{Group: "apps", Version: "v1", Resource: "deployments", Short: []string{"deploy"}, Categories: all,
			Object: &appsv1.Deployment{}, List: &appsv1.DeploymentList{}, Status: true, Generation: true, Scale: deploymentScale(),
			UpdateStatus: func(obj, old runtime.Object) { obj.(*appsv1.Deployment).Labels = old.(*appsv1.Deployment).Labels },
			Print: prints("Name,Ready,Up-to-date#,Available#,Age|Containers,Images,Selector", func(d *appsv1.Deployment) []any {
				names, images := images(d.Spec.Template.Spec)
				return []any{d.Name, fmt.Sprintf("%d/%d", d.Status.ReadyReplicas, deref(d.Spec.Replicas)), int64(d.Status.UpdatedReplicas),
					int64(d.Status.AvailableReplicas), age(d.CreationTimestamp), names, images, metav1.FormatLabelSelector(d.Spec.Selector)}
			})},
		{Group: "apps", Version: "v1", Resource: "replicasets", Short: []string{"rs"}, Categories: all,
			Object: &appsv1.ReplicaSet{}, List: &appsv1.ReplicaSetList{}, Status: true, Generation: true, Scale: replicaSetScale(),
			Fields: func(obj runtime.Object) fields.Set {
				return fields.Set{"status.replicas": itoa(obj.(*appsv1.ReplicaSet).Status.Replicas)}
			},
			Print: prints("Name,Desired#,Current#,Ready#,Age|Containers,Images,Selector", func(r *appsv1.ReplicaSet) []any {
				names, images := images(r.Spec.Template.Spec)
				return []any{r.Name, int64(deref(r.Spec.Replicas)), int64(r.Status.Replicas), int64(r.Status.ReadyReplicas),
					age(r.CreationTimestamp), names, images, metav1.FormatLabelSelector(r.Spec.Selector)}
			})},
		{Group: "apps", Version: "v1", Resource: "statefulsets", Short: []string{"sts"}, Categories: all,
			Object: &appsv1.StatefulSet{}, List: &appsv1.StatefulSetList{}, Status: true, Generation: true, Scale: statefulSetScale(),
			Print: prints("Name,Ready,Age|Containers,Images", func(s *appsv1.StatefulSet) []any {
				names, images := images(s.Spec.Template.Spec)
				return []any{s.Name, fmt.Sprintf("%d/%d", s.Status.ReadyReplicas, deref(s.Spec.Replicas)), age(s.CreationTimestamp), names, images}
			})},
		{Group: "apps", Version: "v1", Resource: "daemonsets", Short: []string{"ds"}, Categories: all,
			Object: &appsv1.DaemonSet{}, List: &appsv1.DaemonSetList{}, Status: true, Generation: true,
			Create: func(obj runtime.Object) { setTemplateGeneration(obj.(*appsv1.DaemonSet), 1) },
			Update: func(obj, old runtime.Object) {
				d, o := obj.(*appsv1.DaemonSet), old.(*appsv1.DaemonSet)
				n := templateGeneration(o)
				if !apiequality.Semantic.DeepEqual(d.Spec.Template, o.Spec.Template) {
					n++
				}
				setTemplateGeneration(d, n)
			},
			Print: prints("Name,Desired#,Current#,Ready#,Up-to-date#,Available#,Node Selector,Age|Containers,Images,Selector", func(d *appsv1.DaemonSet) []any {
				names, images := images(d.Spec.Template.Spec)
				return []any{d.Name, int64(d.Status.DesiredNumberScheduled), int64(d.Status.CurrentNumberScheduled), int64(d.Status.NumberReady),
					int64(d.Status.UpdatedNumberScheduled), int64(d.Status.NumberAvailable), labels.FormatLabels(d.Spec.Template.Spec.NodeSelector),
					age(d.CreationTimestamp), names, images, metav1.FormatLabelSelector(d.Spec.Selector)}
			})},
		{Group: "apps", Version: "v1", Resource: "controllerrevisions", Object: &appsv1.ControllerRevision{}, List: &appsv1.ControllerRevisionList{},
			Print: prints("Name,Controller,Revision#,Age", func(r *appsv1.ControllerRevision) []any {
				owner := "<none>"
				if c := metav1.GetControllerOf(r); c != nil {
					owner = strings.ToLower(c.Kind) + "/" + c.Name
				}
				return []any{r.Name, owner, r.Revision, age(r.CreationTimestamp)}
			})},
	}
}

// templateGeneration is where apps/v1 keeps the generation of a daemon set's
// template; the field of old is gone from the type.
func templateGeneration(d *appsv1.DaemonSet) (n int64) {
	_, _ = fmt.Sscan(d.Annotations[appsv1.DeprecatedTemplateGeneration], &n)
	return max(n, 1)
}

func setTemplateGeneration(d *appsv1.DaemonSet, n int64) {
	metav1.SetMetaDataAnnotation(&d.ObjectMeta, appsv1.DeprecatedTemplateGeneration, itoa(n))
}

func batchKinds() []*Kind {
	all := []string{"all"}
	return []*Kind{
		{Group: "batch", Version: "v1", Resource: "jobs", Categories: all, Object: &batchv1.Job{}, List: &batchv1.JobList{},
			Status: true, Generation: true, Garbage: rest.OrphanDependents, Create: selectJobPods,
			Fields: func(obj runtime.Object) fields.Set {
				return fields.Set{"status.successful": itoa(obj.(*batchv1.Job).Status.Succeeded)}
			},
			Print: prints("Name,Status,Completions,Duration,Age|Containers,Images,Selector", jobCells)},
		{Group: "batch", Version: "v1", Resource: "cronjobs", Short: []string{"cj"}, Categories: all, Object: &batchv1.CronJob{}, List: &batchv1.CronJobList{},
			Status: true, Generation: true,
			Print: prints("Name,Schedule,Timezone,Suspend,Active#,Last Schedule,Age|Containers,Images,Selector", func(c *batchv1.CronJob) []any {
				last := "<none>"
				if t := c.Status.LastScheduleTime; t != nil {
					last = age(*t)
				}
				suspend := "False"
				if deref(c.Spec.Suspend) {
					suspend = "True"
				}
				names, images := images(c.Spec.JobTemplate.Spec.Template.Spec)
				return []any{c.Name, c.Spec.Schedule, orNone(deref(c.Spec.TimeZone)), suspend, int64(len(c.Status.Active)), last, age(c.CreationTimestamp),
					names, images, metav1.FormatLabelSelector(c.Spec.JobTemplate.Spec.Selector)}
			})},
	}
}

// selectJobPods makes a job find its own pods and no others, unless its maker
// takes care of that.
func selectJobPods(obj runtime.Object) {
	j := obj.(*batchv1.Job)
	if deref(j.Spec.ManualSelector) {
		return
	}
	set := func(m *map[string]string, key, value string) {
		if *m == nil {
			*m = map[string]string{}
		}
		if _, ok := (*m)[key]; !ok {
			(*m)[key] = value
		}
	}
	for _, key := range []string{"job-name", batchv1.JobNameLabel} {
		set(&j.Spec.Template.Labels, key, j.Name)
	}
	for _, key := range []string{"controller-uid", batchv1.ControllerUidLabel} {
		set(&j.Spec.Template.Labels, key, string(j.UID))
	}
	if j.Spec.Selector == nil {
		j.Spec.Selector = &metav1.LabelSelector{}
	}
	set(&j.Spec.Selector.MatchLabels, batchv1.ControllerUidLabel, string(j.UID))
}

func jobCells(j *batchv1.Job) []any {
	completions := fmt.Sprintf("%d/1", j.Status.Succeeded)
	if j.Spec.Completions != nil {
		completions = fmt.Sprintf("%d/%d", j.Status.Succeeded, *j.Spec.Completions)
	} else if p := deref(j.Spec.Parallelism); p > 1 {
		completions = fmt.Sprintf("%d/1 of %d", j.Status.Succeeded, p)
	}
	took := ""
	if start := j.Status.StartTime; start != nil {
		end := time.Now()
		if j.Status.CompletionTime != nil {
			end = j.Status.CompletionTime.Time
		}
		took = duration.HumanDuration(end.Sub(start.Time))
	}
	names, images := images(j.Spec.Template.Spec)
	return []any{j.Name, jobStatus(j), completions, took, age(j.CreationTimestamp), names, images, metav1.FormatLabelSelector(j.Spec.Selector)}
}

func jobStatus(j *batchv1.Job) string {
	is := func(kind batchv1.JobConditionType) bool {
		for _, c := range j.Status.Conditions {
			if c.Type == kind {
				return c.Status == corev1.ConditionTrue
			}
		}
		return false
	}
	switch {
	case is(batchv1.JobComplete):
		return "Complete"
	case is(batchv1.JobFailed):
		return "Failed"
	case j.DeletionTimestamp != nil:
		return "Terminating"
	}
	for _, kind := range []batchv1.JobConditionType{batchv1.JobSuspended, batchv1.JobFailureTarget, batchv1.JobSuccessCriteriaMet} {
		if is(kind) {
			return string(kind)
		}
	}
	return "Running"
}
