package controller_test

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// daemonSetAndStatefulSet makes one of each and waits until they run.
func (c *cluster) daemonSetAndStatefulSet() {
	c.t.Helper()
	ctx := context.Background()
	agent, db := map[string]string{"app": "agent"}, map[string]string{"app": "db"}
	_, err := c.client.AppsV1().DaemonSets("shop").Create(ctx, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "agent"},
		Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: agent}, Template: template(agent)}}, metav1.CreateOptions{})
	c.must(err)
	three := int32(3)
	_, err = c.client.AppsV1().StatefulSets("shop").Create(ctx, &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db"},
		Spec: appsv1.StatefulSetSpec{Replicas: &three, ServiceName: "db", Selector: &metav1.LabelSelector{MatchLabels: db}, Template: template(db)}}, metav1.CreateOptions{})
	c.must(err)
	c.untilWhere("a daemon set pod on each machine", "shop", "app=agent", "n1:1 n2:1 n3:1")
	c.untilWhere("a stateful set over the machines", "shop", "app=db", "n1:1 n2:1 n3:1")
	if got := c.names("shop", "app=db"); got != "db-0 db-1 db-2" {
		c.t.Errorf("the pods of the stateful set are called %s", got)
	}
}

// jobs runs one to its end, and one made by a cron job.
func (c *cluster) jobs() {
	c.t.Helper()
	ctx := context.Background()
	pod := template(map[string]string{"finishes": "yes"})
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	two := int32(2)
	_, err := c.client.BatchV1().Jobs("shop").Create(ctx, &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: "count"},
		Spec: batchv1.JobSpec{Completions: &two, Template: pod}}, metav1.CreateOptions{})
	c.must(err)
	c.until("a job is complete", func() string {
		j, err := c.client.BatchV1().Jobs("shop").Get(ctx, "count", metav1.GetOptions{})
		for _, k := range j.Status.Conditions {
			if k.Type == batchv1.JobComplete && k.Status == corev1.ConditionTrue {
				return ""
			}
		}
		return fmt.Sprintf("%+v %v", j.Status, err)
	})
}

// budget makes a disruption budget for the three pods of "web".
func (c *cluster) budget() {
	c.t.Helper()
	ctx := context.Background()
	two := intstr.FromInt32(2)
	_, err := c.client.PolicyV1().PodDisruptionBudgets("shop").Create(ctx, &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: policyv1.PodDisruptionBudgetSpec{MinAvailable: &two, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}}, metav1.CreateOptions{})
	c.must(err)
	c.until("one of three may be disrupted", func() string {
		b, err := c.client.PolicyV1().PodDisruptionBudgets("shop").Get(ctx, "web", metav1.GetOptions{})
		if err != nil || b.Status.DisruptionsAllowed != 1 || b.Status.ExpectedPods != 3 {
			return fmt.Sprintf("%+v %v", b.Status, err)
		}
		return ""
	})
}

// expiredToken makes a join token that is past its time.
func (c *cluster) expiredToken() {
	c.t.Helper()
	_, err := c.client.CoreV1().Secrets("kube-system").Create(context.Background(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-abcdef"}, Type: corev1.SecretTypeBootstrapToken,
		StringData: map[string]string{"token-id": "abcdef", "token-secret": "0123456789abcdef", "expiration": "2020-01-01T00:00:00Z"},
	}, metav1.CreateOptions{})
	c.must(err)
}

// localVolume runs a pod with a claim of the default class, deletes the pod
// and sees the next one go to the same machine.
func (c *cluster) localVolume() {
	c.t.Helper()
	ctx := context.Background()
	core := c.client.CoreV1()
	_, err := core.PersistentVolumeClaims("shop").Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "data"},
		Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}}}}, metav1.CreateOptions{})
	c.must(err)
	pod := template(map[string]string{"app": "disk"})
	pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}}}
	place := ""
	for _, name := range []string{"first", "second"} {
		_, err := core.Pods("shop").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: pod.Labels}, Spec: pod.Spec}, metav1.CreateOptions{})
		c.must(err)
		c.until("pod "+name+" runs", func() string {
			p, err := core.Pods("shop").Get(ctx, name, metav1.GetOptions{})
			if err != nil || !podReady(p) || place != "" && place != p.Spec.NodeName {
				return fmt.Sprintf("on %q, want %q: %v %v", p.Spec.NodeName, place, p.Status.Conditions, err)
			}
			place = p.Spec.NodeName
			return ""
		})
		c.must(core.Pods("shop").Delete(ctx, name, metav1.DeleteOptions{}))
	}
	claim, err := core.PersistentVolumeClaims("shop").Get(ctx, "data", metav1.GetOptions{})
	c.must(err)
	volume, err := core.PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
	c.must(err)
	if claim.Status.Phase != corev1.ClaimBound || volume.Status.Phase != corev1.VolumeBound || volume.Spec.HostPath == nil {
		c.t.Errorf("claim %s, volume %s: %+v", claim.Status.Phase, volume.Status.Phase, volume.Spec)
	}
	c.must(core.PersistentVolumeClaims("shop").Delete(ctx, "data", metav1.DeleteOptions{}))
	c.until("its volume is released, not deleted", func() string {
		v, err := core.PersistentVolumes().Get(ctx, volume.Name, metav1.GetOptions{})
		if err != nil || v.Status.Phase != corev1.VolumeReleased {
			return fmt.Sprint(v.Status.Phase, err)
		}
		return ""
	})
}
