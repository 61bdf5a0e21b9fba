package controller_test

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
